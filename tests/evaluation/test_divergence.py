"""Scores against their definitions, written out."""

import math

import torch
import torch.nn.functional as F
from tiny import tiny

from qat.evaluation.divergence import evaluate, mean, standard_error


def test_scores_are_what_they_are_defined_to_be():
    model, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    windows = torch.randint(0, 256, (5, 16))
    scores = evaluate(other, windows, model, batch_size=2)
    assert scores.tokens == 15
    with torch.no_grad():
        p = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
        q = other(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    nll = -q.gather(-1, windows[:, 1:, None]).squeeze(-1).sum(-1)
    kl = (p.exp() * (p - q)).sum((-1, -2))
    agree = (p.argmax(-1) == q.argmax(-1)).double().sum(-1)
    assert torch.allclose(scores.nll, nll, rtol=1e-5)
    assert torch.allclose(scores.kl, kl, rtol=1e-4)
    assert torch.equal(scores.agree, agree)
    loss = F.cross_entropy(q.flatten(0, 1), windows[:, 1:].flatten())
    assert math.isclose(mean(scores.nll, scores.tokens), float(loss), rel_tol=1e-6)


def test_both_models_are_judged_in_eval_mode():
    model = tiny(attention_dropout=0.5)
    windows = torch.randint(0, 256, (2, 16))
    scores = evaluate(model.train(), windows, tiny(attention_dropout=0.5).train())
    assert float(scores.kl.abs().max()) < 1e-6


def test_scores_do_not_depend_on_the_batch_size():
    model, windows = tiny(), torch.randint(0, 256, (4, 16))
    a, b = evaluate(model, windows, model, 1), evaluate(model, windows, model, 4)
    assert torch.allclose(a.nll, b.nll, rtol=1e-6)
    assert float(b.kl.abs().max()) < 1e-5


def test_paired_standard_error_is_that_of_the_difference():
    a, b = torch.randn(50, dtype=torch.float64) * 10, torch.randn(50, dtype=torch.float64)
    expected = ((a - b) / 7).std() / math.sqrt(50)
    assert math.isclose(standard_error(a, 7, b), float(expected))
    assert standard_error(a, 7, a) == 0
