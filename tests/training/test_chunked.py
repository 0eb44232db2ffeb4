"""Chunks change nothing but memory: the unchunked loss and its gradients, and logits of one chunk at most."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import embedded, recipe, scheme, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from qat.nn.estimators import LSQ
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.prepare import prepare
from qat.training import chunked
from qat.training.chunked import chunked_loss
from qat.training.divergences import per_token
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule
from qat.training.split import SplitModel

LOSS = Loss(kl=0.5, reverse_kl=0.25, jsd=2.0, beta=0.3, ce=0.7)
VOCABULARY = 256


def prepared(tied=True, train_embeddings=False, head=None, inputs=None):
    model = tiny(tied=tied)
    rules = dict(recipe().rules) | {"head": Rule("lm_head", head, inputs)}
    prepare(model, Recipe(rules), MinMax(), LSQ(), train_embeddings=train_embeddings)
    return model


def quantized(train_embeddings):
    model = tiny()
    prepare(model, embedded(), MinMax(), LSQ(), train_embeddings=train_embeddings)
    return model


def capped():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=VOCABULARY, **sizes, **heads, initializer_range=0.2, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


HEADS = {
    "frozen and tied": prepared,
    "trained": lambda: prepared(tied=False),
    "trained and tied": lambda: prepared(train_embeddings=True),
    "quantized": lambda: prepared(tied=False, head=scheme(3)),
    "quantized with inputs": lambda: prepared(
        tied=False, head=scheme(8), inputs=Scheme(IntGrid(8), PerToken(), dynamic=True)
    ),
    "quantized and tied": lambda: quantized(False),
    "quantized, tied and trained": lambda: quantized(True),
    "plain": lambda: tiny(tied=False),
    "soft-capped": capped,
}


def batch(rows=2, length=20):
    return torch.randint(0, VOCABULARY, (rows, length))


def step(loss, student, teacher, ids):
    """Loss and gradients in chunks."""
    split, taught = SplitModel(student), SplitModel(teacher) if teacher is not None else None
    student.zero_grad()
    with torch.no_grad():
        given = None if taught is None else taught.hidden(ids)
    parts = chunked_loss(loss, split, split.hidden(ids), taught, given, ids)
    (parts["loss"] / 4).backward()  # as if accumulated
    return parts, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def whole(loss, student, teacher, ids):
    """The same by autograd through all logits at once."""
    student.zero_grad()
    with torch.no_grad():
        other = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=ids, use_cache=False).logits
    parts = per_token(loss, logits.flatten(0, 1), other, ids.flatten())
    parts["ce"] = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    means = {name: part.mean() for name, part in parts.items()}
    means["loss"] = sum(weight * means[name] for name, weight in loss.weights.items())
    (means["loss"] / 4).backward()
    return means, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def same(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.detach().abs().max())
        assert torch.allclose(found[name].detach(), value.detach(), rtol=0, atol=rtol * scale), name


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_without_chunks(head, size, monkeypatch):
    if size == 1 and head != "trained":
        return  # one head at a token a time is enough
    monkeypatch.setattr(chunked, "LOGITS_CPU", size * VOCABULARY)
    student, ids = HEADS[head](), batch()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    parts, gradients = step(LOSS, student, teacher, ids)
    expected = whole(LOSS, student, teacher, ids)
    same(parts, expected[0], 1e-6)
    same(gradients, expected[1], 2e-5)
    owners = {"trained": "lm_head.parametrizations.weight.original", "quantized": "lm_head.weight_fake_quant.log_step"}
    assert owners.get(head, "model.norm") in " ".join(gradients)


def test_under_autocast_as_in_training(monkeypatch):
    """Cast weights are cached between chunks, and a plain head's is."""
    monkeypatch.setattr(chunked, "LOGITS_CPU", 7 * VOCABULARY)
    student, teacher, ids = tiny(tied=False), tiny(tied=False), batch()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    with torch.autocast("cpu", torch.bfloat16):
        parts, gradients = step(LOSS, student, teacher, ids)
        expected = whole(LOSS, student, teacher, ids)
    same(parts, expected[0], 1e-6)
    same(gradients, expected[1], 2**-5)  # sums of terms that are rounded to bf16
    assert torch.nn.functional.cosine_similarity(
        gradients["lm_head.weight"].flatten(), expected[1]["lm_head.weight"].flatten(), dim=0
    ) == pytest.approx(1, abs=1e-4)


def given(device):
    """What `chunked_loss` takes, of untied models with other weights than each other's; hidden states are leaves."""
    student, teacher, ids = tiny(tied=False).to(device), tiny(tied=False).to(device), batch().to(device)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
        split, taught = SplitModel(student), SplitModel(teacher)
        hidden, other = split.hidden(ids), taught.hidden(ids)
    return split, hidden.requires_grad_(), taught, other, ids


def gradients_of(parts, split, hidden):
    found = torch.autograd.grad(parts["loss"], [hidden, split.model.lm_head.weight])
    return dict(zip(("hidden", "head"), found, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_and_gradients_are_those_of_float64(device, monkeypatch):
    for limit in ("LOGITS_CPU", "LOGITS"):
        monkeypatch.setattr(chunked, limit, 7 * VOCABULARY)
    split, hidden, taught, other, ids = given(device)
    parts = chunked_loss(LOSS, split, hidden, taught, other, ids)
    found = gradients_of(parts, split, hidden)
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, split.model.lm_head.weight))
    log_q = (exact @ weight.T).log_softmax(-1)
    log_p = (other.double() @ taught.model.lm_head.weight.detach().double().T).log_softmax(-1)
    log_m = (LOSS.beta * log_p.exp() + (1 - LOSS.beta) * log_q.exp()).log()

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1).mean()

    expected = {
        "kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "jsd": LOSS.beta * kl(log_p, log_m) + (1 - LOSS.beta) * kl(log_q, log_m),
        "ce": F.nll_loss(log_q[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    }
    expected["loss"] = sum(factor * expected[name] for name, factor in LOSS.weights.items())
    of_loss = torch.autograd.grad(expected["loss"], [exact, weight])
    same({n: part.double() for n, part in parts.items()}, expected, 1e-5)
    same({n: g.double() for n, g in found.items()}, dict(zip(found, of_loss, strict=True)), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_in_a_cuda_graph_it_is_replayed(dtype, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 16 * VOCABULARY)
    split, hidden, taught, other, ids = given("cuda")

    def compute():
        with torch.autocast("cuda", dtype, enabled=dtype is torch.bfloat16, cache_enabled=False):
            parts = chunked_loss(LOSS, split, hidden, taught, other, ids)
        return {**{n: part.detach() for n, part in parts.items()}, **gradients_of(parts, split, hidden)}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for _ in range(2):
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
            other.copy_(torch.randn_like(other))
            ids.copy_(batch())
        graph.replay()
        same(captured, compute(), 1e-6 if dtype is torch.float32 else 2**-8)


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"), [(40, 7, [7] * 5 + [5]), (8192, 5461, [4096] * 2), (3, 0, [1] * 3)]
)
def test_chunks_are_few_and_alike(tokens, most, sizes):
    assert [len(range(tokens)[chunk]) for chunk in chunked._chunks(tokens, most)] == sizes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_there_is_the_value(mode, monkeypatch):
    student, ids = tiny(tied=False), batch()
    split = SplitModel(student)
    expected = chunked_loss(Loss(kl=0.0, ce=1.0), split, split.hidden(ids), None, None, ids)["ce"]
    monkeypatch.setattr(chunked, "LOGITS_CPU", 7 * VOCABULARY)
    with mode():
        found = chunked_loss(Loss(kl=0.0, ce=1.0), split, split.hidden(ids), None, None, ids)
    assert float(found["ce"]) == pytest.approx(float(expected), rel=1e-6)
    assert not found["loss"].requires_grad


class LargestLogits(TorchDispatchMode):
    """Elements of the largest tensor that has the vocabulary as an axis and is not as small as a weight."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and VOCABULARY in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("head", HEADS)
def test_no_tensor_grows_with_batch_times_sequence_times_vocabulary(head, monkeypatch):
    tokens = 96
    monkeypatch.setattr(chunked, "LOGITS_CPU", tokens * VOCABULARY)
    student = HEADS[head]()
    module = QATModule(student, copy.deepcopy(student), LOSS, PhaseSchedule(), Optim(), 4)
    module.log_dict = lambda values: None
    assert tokens * VOCABULARY > max(p.numel() for p in student.parameters())  # no weight hides the logits
    for ids in (batch(4, 48), batch(8, 96)):
        with LargestLogits() as training:
            module.training_step(ids, 0).backward()
        assert training.elements == tokens * VOCABULARY
        with LargestLogits() as validation, torch.no_grad():
            module.validation_step(ids, 0)
        assert validation.elements == tokens * VOCABULARY


def test_the_count_finds_logits_that_are_not_chunked():
    student, ids = tiny(), batch(4, 48)
    with LargestLogits() as found:
        whole(LOSS, student, tiny(), ids)
    assert found.elements == ids.numel() * VOCABULARY
