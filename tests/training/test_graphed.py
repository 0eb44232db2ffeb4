"""A replayed step is the step: the same bits, and gradients that nobody overwrites."""

import copy

import pytest
import torch
from tiny import recipe, tiny, tokens

from qat.nn.estimators import LSQ, Clipped
from qat.nn.fake_quantize import Phase
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import prepare, set_phase
from qat.training.certify import certify
from qat.training.fit import Training, fit
from qat.training.graphed import GraphedLoss, _Replayed, near
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule

BATCHES = [torch.arange(start, start + 64).reshape(4, 16) for start in (1, 65, 129)]


def test_known_gradients_reach_their_parameters_scaled_and_as_copies():
    first, second, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    known = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), None]
    for _ in range(2):
        (_Replayed.apply(torch.tensor(7.0), known, first, second, idle) / 2).backward()
    known[0].zero_()
    assert first.grad.tolist() == [1.0, 2.0]
    assert second.grad.tolist() == [3.0, 4.0]
    assert idle.grad is None


def test_gradients_are_compared_by_their_norm_and_none_may_be_missing():
    some, other = [torch.ones(4, 4), None, torch.ones(3)], torch.ones(4, 4)
    assert near(some, [other * 1.01, None, torch.ones(3)])
    assert not near(some, [other * 1.2, None, torch.ones(3)])
    assert not near(some, [other, None, torch.zeros(3)])
    assert not near(some, [other, torch.ones(1), torch.ones(3)])
    assert not near(some, [other * torch.nan, None, torch.ones(3)])


def test_a_cpu_has_no_graphs():
    with pytest.raises(AssertionError, match="not on cpu"):
        GraphedLoss(lambda x: {"loss": x.sum()}, [], torch.ones(1))


def trained(graphed, estimator, autocast, loss, phase=Phase.LEARN):
    """Losses and parameters after some optimizer steps, two micro-batches each."""
    student = tiny()
    prepare(student, recipe(), MinMax(), copy.copy(estimator))
    module = QATModule(student.cuda(), tiny().cuda(), loss, PhaseSchedule(), Optim(), 4)
    set_phase(student.train(), phase)
    optimizer, schedule = Optim(lr=1e-3).build(student, 4)
    losses, graph = [], None
    for _ in range(3):
        for ids in BATCHES[:2]:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                if graphed and graph is None:
                    parameters = [p for p in student.parameters() if p.requires_grad]
                    graph = GraphedLoss(module.parts, parameters, BATCHES[2].cuda())
                parts = graph(ids.cuda()) if graphed else module.parts(ids.cuda())
            (parts["loss"] / 2).backward()
            losses.append({name: float(value.detach()) for name, value in parts.items()})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().cpu() for name, p in student.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", [Loss(), Loss(kl=0.5, reverse_kl=0.5, jsd=1.0, ce=0.5)])
@pytest.mark.parametrize("estimator", [LSQ(), Clipped()])
def test_replayed_training_is_eager_training_bit_for_bit(estimator, loss, autocast):
    phase = Phase.LEARN if estimator.learns_scale else Phase.FROZEN
    (losses, parameters), (others, expected) = (
        trained(graphed, estimator, autocast, loss, phase=phase) for graphed in (True, False)
    )
    assert losses == others
    assert losses[0] != losses[2], "an optimizer step reaches the graph"
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("stale", [False, True])
def test_a_graph_that_reads_what_a_weight_was_is_found(stale):
    student = tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    module = QATModule(student.cuda(), tiny().cuda(), Loss(), PhaseSchedule(), Optim(), 4)
    parameters = [p for p in student.train().parameters() if p.requires_grad]
    graph = GraphedLoss(module.parts, parameters, BATCHES[0].cuda())
    weight = student.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.data = weight.mul(1.5) if stale else weight.data.mul_(1.5)
    if stale:
        with pytest.raises(AssertionError, match="the replayed loss is"):
            graph.check()
    else:
        graph.check()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fit_on_a_gpu_is_replayed_and_certified(compiled, tmp_path):
    student = tiny().cuda()
    prepare(student, recipe(), MinMax(), LSQ())
    training = Training(max_steps=3, batch_size=2, seq_len=16, accumulate=2, val_every=2, compile=compiled)
    data, device = tokens(tmp_path / "tokens"), torch.device("cuda")
    module, _ = fit(student, tiny(), data, training, Loss(), PhaseSchedule(), Optim(), tmp_path, device)
    shape = (2, 16) if compiled else None
    evidence = certify(module, [BATCHES[1][:1]], "bf16-mixed", shape)[2]
    assert evidence == {"modules": 14, "equal": 14, "dtype": "bfloat16", "replayed": True}
