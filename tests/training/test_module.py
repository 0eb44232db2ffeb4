import re

import pytest
import torch
from tiny import recipe, tiny
from torch._dynamo.utils import counters

from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import prepare
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule
from qat.training.split import SplitModel, compiled_blocks


def module(teacher="same", loss=None, **kwargs):
    student = tiny()
    prepare(student, recipe(), MinMax(), kwargs.pop("estimator", LSQ()))
    teacher = tiny() if teacher == "same" else teacher
    return QATModule(student, teacher, loss or Loss(), PhaseSchedule(), Optim(), 4, **kwargs)


def test_the_teacher_is_no_part_of_the_module():
    found = module()
    assert found.teacher is not None
    assert not [n for n, _ in found.named_parameters() if "teacher" in n]
    assert all(n.startswith(("student.", "val_")) for n in found.state_dict())


def test_masters_that_are_not_fp32_are_a_bug():
    found = module()
    found.student.model.norm.parametrizations.weight.original.data = torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"model\.norm.*masters are fp32, found torch\.bfloat16"):
        found.configure_optimizers()


def test_another_vocabulary_and_a_missing_teacher_are_refused():
    other = tiny()
    other.config.vocab_size = 300
    with pytest.raises(ValueError, match=r"another vocabulary: config\.vocab_size 300 \(student 256\)\. .*loss=ce"):
        module(other)
    padded = tiny()
    padded.resize_token_embeddings(320)
    padded.config.vocab_size = 256  # what a padded checkpoint may say
    with pytest.raises(ValueError, match=r"embeddings 320 \(student 256\), logits 320 \(student 256\)"):
        module(padded)
    for loss in (Loss(), Loss(kl=0.0, jsd=1.0), Loss(kl=0.0, reverse_kl=1.0, ce=1.0)):
        with pytest.raises(ValueError, match="needs the full-precision teacher"):
            module(None, loss)
    assert module(None, Loss(kl=0.0, ce=1.0)).teacher is None
    assert module(other, Loss(kl=0.0, ce=1.0)).teacher is None  # nobody asks it


def test_a_checkpoint_of_another_schedule_is_refused():
    found = module(estimator=StraightThrough())
    checkpoint = {"global_step": 1, "qat_rng": {"cpu": torch.get_rng_state()}, "qat_phase": "learn"}
    with pytest.raises(ValueError, match="the checkpoint is in phase learn, the schedule says frozen"):
        found.on_load_checkpoint(checkpoint)


def test_clipping_keeps_weights_and_scales_apart():
    found = module()
    found.log = lambda *args, **kwargs: None
    optimizer, _ = Optim().build(found.student, 4)
    groups = {g["name"]: g["params"] for g in optimizer.param_groups}
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 100.0 if name == "scales" else 1e-3)
    before = groups["weights"][0].grad.clone()
    found.configure_gradient_clipping(optimizer, 10.0, "norm")
    norm = torch.stack([p.grad.norm() for p in groups["scales"]]).norm()
    assert float(norm) == pytest.approx(10.0, rel=1e-3)
    assert torch.equal(groups["weights"][0].grad, before)
    groups["vectors"][0].grad[0] = float("inf")
    name = next(n for n, p in found.student.named_parameters() if p is groups["vectors"][0])
    with pytest.raises(
        ValueError, match=rf"the gradient of the weights is inf at step 0 \(first that of {re.escape(name)}\); the last"
    ):
        found.configure_gradient_clipping(optimizer, 10.0, "norm")


def test_one_window_that_is_not_a_number_is_not_left_out_of_the_mean():
    found = module()
    said = {}
    found.log_dict = said.update
    found.val_nll.update(torch.tensor(1.0))
    found.val_nll.update(torch.tensor(float("nan")))
    found.val_tokens.update(62)
    found.on_validation_epoch_end()
    assert bool(said["val/nll"].isnan())


BATCH = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_nan_is_traced_to_the_module_that_produced_it():
    """Parameters are finite, and so is what reaches it. Compiled graphs call no hooks, so they are not asked."""
    found, calls = module(), []
    found.student.model.layers[1].mlp.act_fn.forward = lambda x: (x - x) / (x - x)
    block = found.student.model.layers[0]
    found.split.compiled = {block: lambda *args, **kwargs: calls.append(1) or block._call_impl(*args, **kwargs)}
    words = r"loss is nan at step 0 \(the output of model\.layers\.1\.mlp\.act_fn is not finite\); the last checkpoint"
    with pytest.raises(ValueError, match=words):
        found.training_step(BATCH, 0)
    assert calls == [1]


def test_a_teacher_that_is_not_finite_is_told_from_the_student():
    found = module()
    with torch.no_grad():
        found.teacher.model.layers[0].self_attn.v_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"output of the teacher's model\.layers\.0\.self_attn\.v_proj is not finite"):
        found.training_step(BATCH, 0)


def replays(found, monkeypatch):
    """As on a GPU, where nobody waits: what is not finite is found in the next step, and has moved nothing."""
    monkeypatch.setattr(found, "_replays", lambda: True)
    monkeypatch.setattr(found, "_replayed", found.parts)
    found.log = found.log_dict = lambda *args, **kwargs: None
    optimizer, _ = Optim().build(found.student, 4)

    def step():
        loss = found.training_step(BATCH, 0)
        optimizer.zero_grad()
        loss.backward()
        found.configure_gradient_clipping(optimizer, 1.0, "norm")
        optimizer.step()

    return step


def test_a_replayed_loss_that_is_not_a_number_is_found_a_step_later_and_has_moved_nothing(monkeypatch):
    found = module()
    step = replays(found, monkeypatch)
    step()
    before = {name: p.detach().clone() for name, p in found.student.named_parameters()}
    act = found.student.model.layers[1].mlp.act_fn
    act.forward = lambda x: (x - x) / (x - x)
    step()
    assert all(torch.equal(p, before[name]) for name, p in found.student.named_parameters())
    with pytest.raises(ValueError, match=r"loss is nan at step 0 \(the output of model\.layers\.1\.mlp\.act_fn is not"):
        step()


def test_so_is_a_replayed_gradient(monkeypatch):
    found = module()
    step = replays(found, monkeypatch)
    weight = found.student.model.layers[0].self_attn.q_proj.weight
    weight.register_hook(lambda grad: grad * torch.nan)
    before = weight.detach().clone()
    step()
    assert torch.equal(weight, before)
    words = r"gradient of the weights is nan at step 0 \(first that of model\.layers\.0\.self_attn\.q_proj\.weight\)"
    with pytest.raises(ValueError, match=words):
        found.on_validation_epoch_start()


def test_scales_alone_that_are_not_finite_move_nothing_either(monkeypatch):
    found = module()
    step = replays(found, monkeypatch)
    quant = found.student.model.layers[1].mlp.up_proj.weight_fake_quant
    quant.log_step.register_hook(lambda grad: grad * torch.inf)
    before = {name: p.detach().clone() for name, p in found.student.named_parameters()}
    step()
    assert all(torch.equal(p, before[name]) for name, p in found.student.named_parameters())
    with pytest.raises(ValueError, match="gradient of the scales"):
        found.on_save_checkpoint({})
    step()
    with pytest.raises(ValueError, match="gradient of the scales"):
        found.on_train_end()


def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is(monkeypatch):
    found = module()
    step = replays(found, monkeypatch)
    monkeypatch.setattr(found, "_replayed", lambda batch: {"loss": found.parts(batch)["loss"] + torch.inf})
    before = {name: p.detach().clone() for name, p in found.student.named_parameters()}
    step()
    assert all(torch.equal(p, before[name]) for name, p in found.student.named_parameters())


def test_an_eager_step_after_a_replayed_one_is_not_held_back(monkeypatch):
    found = module()
    optimizer, _ = Optim().build(found.student, 4)
    optimizer.found_inf = torch.ones(())  # of a step before
    found.log = found.log_dict = lambda *args, **kwargs: None
    found.training_step(BATCH, 0).backward()
    found.configure_gradient_clipping(optimizer, 1.0, "norm")
    assert optimizer.found_inf is None


def test_a_replayed_step_moves_what_an_eager_one_does(monkeypatch):
    found, eager = module(), module()
    replays(found, monkeypatch)()
    eager.log = eager.log_dict = lambda *args, **kwargs: None
    optimizer, _ = Optim().build(eager.student, 4)
    eager.training_step(BATCH, 0).backward()
    eager.configure_gradient_clipping(optimizer, 1.0, "norm")
    optimizer.step()
    expected = dict(eager.student.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in found.student.named_parameters())


@pytest.mark.whole
def test_a_compiled_decoder_trains_the_same():
    loss = Loss(kl=0.0, reverse_kl=1.0, jsd=1.0, ce=0.1)
    eager, compiled = module(loss=loss), module(loss=loss)
    compiled.split.compiled = compiled_blocks(compiled.student.base_model, "aot_eager")
    for one in (eager, compiled):
        one.log_dict = lambda values: None
        one.student.train()
        one.training_step(BATCH, 0).backward()
    torch._dynamo.reset()
    ours = dict(compiled.student.named_parameters())
    for name, parameter in eager.student.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_compiling_is_of_the_blocks_and_ends_with_the_forward(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, backend: call)
    found = module(compiled=True)
    for one in (found.split, found._teacher):
        assert list(one.compiled) == list(one.model.model.layers)
    found.parts(BATCH)
    assert all(layer._compiled_call_impl is None for layer in found.student.model.layers)


@pytest.mark.whole
def test_one_compilation_serves_all_blocks_but_the_first():
    """Whose input has no gradient."""
    student = tiny(layers=3).train()
    prepare(student, recipe(), MinMax(), LSQ())
    split = SplitModel(student)
    split.compiled = compiled_blocks(student.base_model, "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    split.hidden(BATCH).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("schedule", "replayed"),
    [
        (PhaseSchedule(), [True] * 4),
        (PhaseSchedule(start=1, freeze=2), [True, False, True, True]),
        (PhaseSchedule(ramp=2), [True, False, True, True]),
    ],
)
def test_what_is_replayed_is_settled(schedule, replayed, monkeypatch):
    found = module()
    found.schedule = schedule
    monkeypatch.setattr(QATModule, "device", torch.device("cuda"))
    for found.done, expected in enumerate(replayed):
        assert found._replays() is expected
    found.graphed = False
    assert not found._replays()


def test_what_a_step_was_captured_for_is_all_that_the_schedule_says(monkeypatch):
    """A ramp begins with weights as they are: what was captured then is not what comes after it."""
    captured = []

    class Captured:
        def __init__(self, function, parameters, batch):
            captured.append(found.schedule.strength(found.done))
            self.function = function

        def __call__(self, batch):
            return self.function(batch)

    monkeypatch.setattr("qat.training.module.GraphedLoss", Captured)
    monkeypatch.setattr(QATModule, "device", torch.device("cuda"))
    for ramp in (2, 1):  # with a step between that is not replayed, and without
        captured.clear()
        found = module()
        found.schedule = PhaseSchedule(ramp=ramp)
        found.log = found.log_dict = lambda *args, **kwargs: None
        for found.done in range(5):
            found.as_trained()
            found.training_step(BATCH, 0)
            assert (found._graph is not None) is found._replays()
        assert captured == [0.0, 1.0]
        found.training_step(BATCH[:1], 0)
        assert captured == [0.0, 1.0, 1.0]


def test_validation_is_the_mean_over_predicted_tokens():
    found, said = module(), {}
    found.log_dict = said.update
    with torch.no_grad():
        for ids in (BATCH, BATCH[:1, :5]):
            found.validation_step(ids, 0)
        logits = [found.student(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (BATCH, BATCH[:1, :5])]
    targets = torch.cat([BATCH[:, 1:].flatten(), BATCH[0, 1:5]])
    expected = torch.nn.functional.cross_entropy(torch.cat([part.flatten(0, 1) for part in logits]), targets)
    found.on_validation_epoch_end()
    assert float(said["val/nll"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(said["val/ppl"]) == pytest.approx(float(expected.exp()), rel=1e-5)


def test_training_that_begins_anew_begins_the_schedule_anew():
    """A Trainer that starts at step 0 with a module that another one trained."""
    found = module()
    found.done = 4
    found.on_train_start()
    assert found.done == 0
