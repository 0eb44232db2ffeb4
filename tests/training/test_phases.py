"""The schedule, and law (h) at its boundaries: whoever stops there and goes on gets the unbroken run, bit for bit."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from tiny import scheme, tiny, tokens

from qat.evaluation.divergence import evaluate, mean
from qat.nn.estimators import Clipped, EfficientQAT, LSQPlus
from qat.nn.fake_quantize import Phase
from qat.nn.observers.ema import EMA
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerGroup, PerTensor
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.calibrate import calibrate
from qat.surgery.convert import apply
from qat.surgery.prepare import fake_quants, prepare
from qat.training.certify import certify
from qat.training.checkpoints import newest
from qat.training.datamodule import TokenData
from qat.training.fit import Training, fit
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule
from qat.training.winq import WinQ

pytestmark = pytest.mark.filterwarnings(  # a kept checkpoint goes on in another directory, and is taken less often
    "ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint.*"
)
STEPS = 12
# Starts at 2, freezes at 4, is all the way on at 7, re-initialises after 5 and 10: no two on one step.
SCHEDULE = PhaseSchedule(start=2, freeze=4, ramp=5, winq=WinQ(5, 0.5))
STATIC = Recipe({
    "a": Rule(".*_proj", scheme(3, symmetric=False), Scheme(IntGrid(8), PerTensor(), symmetric=False)),
    "head": Rule("lm_head", None),
})  # fmt: skip
LEARNED, SETTLED = (EfficientQAT(), LSQPlus()), (Clipped(), Clipped())  # of weights and of inputs


class Keep(Callback):
    """Keeps every checkpoint, as a process that was killed right after it would have left it."""

    def __init__(self, directory: Path):
        self.directory = directory

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (path := newest(self.directory / "checkpoints")) and not self.of(trainer.global_step).exists():
            self.of(trainer.global_step).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.of(trainer.global_step))

    def of(self, step: int) -> Path:
        return self.directory / "kept" / f"step={step}.ckpt"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tokens(tmp_path_factory.mktemp("tokens"))


def student(estimators=LEARNED, rule=STATIC):
    model = tiny(layers=1)
    prepare(model, rule, MinMax(), estimators[0], input_observer=EMA(), input_estimator=estimators[1])
    calibrate(model, [torch.arange(64).view(2, 32)])
    return model


def train(directory, data, schedule=SCHEDULE, estimators=LEARNED, callbacks=(), val_every=3):
    training = Training(
        STEPS, batch_size=2, seq_len=32, checkpoint_every=1 if callbacks else STEPS, val_every=val_every, val_windows=1
    )
    model, loss, optim = student(estimators), Loss(kl=1.0, ce=1.0), Optim(lr=1e-3, scale_lr=1e-2)
    module, _ = fit(
        model, tiny(layers=1), data, training, loss, schedule, optim, directory, torch.device("cpu"),
        callbacks=list(callbacks),
    )  # fmt: skip
    return module


def bits(directory):
    """Every tensor of the last checkpoint, those of the optimizer too, by name."""
    checkpoint = torch.load(newest(directory / "checkpoints"), weights_only=True)
    found, moments = dict(checkpoint["state_dict"]), checkpoint["optimizer_states"][0]["state"]
    found |= {f"{key} of {index}": value for index, state in moments.items() for key, value in state.items()}
    return found


def different(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def values(directory, name):
    """What was logged under a name, by step."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    """Runs that were never stopped, by whether scales are learned."""
    found = {}
    for learns, estimators in ((True, LEARNED), (False, SETTLED)):
        found[learns] = tmp_path_factory.mktemp("unbroken")
        train(found[learns], data, estimators=estimators, callbacks=[Keep(found[learns])], val_every=1)
    return found


def test_everything_follows_the_step():
    schedule = PhaseSchedule(start=2, freeze=4, ramp=4, winq=WinQ(3, 0.5))
    assert [schedule.phase(step, True) for step in range(6)] == [
        *([Phase.OFF] * 2), *([Phase.OBSERVE] * 2), *([Phase.LEARN] * 2)
    ]  # fmt: skip
    assert schedule.phase(4, False) is Phase.FROZEN
    assert [schedule.strength(step) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [done for done in range(13) if schedule.reinitialises(done, 12)] == [6, 9]  # not 3: scales still follow
    settled = PhaseSchedule(start=2, freeze=6, winq=WinQ(3, 0.5))
    assert [done for done in range(13) if settled.reinitialises(done, 12)] == [6, 9]  # as soon as they no longer do


def test_without_a_ramp_everything_is_on_at_once_and_nothing_moves():
    assert PhaseSchedule().phase(0, True) is Phase.LEARN
    assert PhaseSchedule().strength(0) == 1.0
    assert not PhaseSchedule().reinitialises(6, 12)


def test_the_ramp_is_the_published_one():
    """lambda = min(2 t / T, 1) at ramp = T / 2."""
    for total in (10, 64, 1000):
        schedule = PhaseSchedule(ramp=total // 2)
        assert all(schedule.strength(t) == min(2 * t / total, 1) for t in range(total))


def test_a_delayed_start_takes_scales_from_the_weights_as_they_then_are():
    schedule = PhaseSchedule(start=3, freeze=3)
    assert [schedule.phase(step, True) for step in range(2, 5)] == [Phase.OFF, Phase.OBSERVE, Phase.LEARN]


@pytest.mark.parametrize("steps", [(-1, 0), (3, 2)])
def test_impossible_orders_are_refused(steps):
    with pytest.raises(ValueError, match="0 <= start <= freeze"):
        PhaseSchedule(*steps)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (PhaseSchedule(start=12, freeze=12), "never be on their grid in training of 12 steps"),
        (PhaseSchedule(start=2, freeze=2, ramp=10), "start=2, ramp=10: weights would never be"),
        (PhaseSchedule(winq=WinQ(12, 0.5)), "winq.every=12: no such step comes after"),
        (PhaseSchedule(freeze=9, winq=WinQ(6, 0.5)), r"winq.every=6: .* \(step 9\)"),
    ],
)
def test_what_would_never_come_to_pass_is_refused_before_training(schedule, words):
    model = student()
    with pytest.raises(ValueError, match=words):
        QATModule(model, tiny(layers=1), Loss(), schedule, Optim(), STEPS)
    QATModule(model, tiny(layers=1), Loss(), schedule, Optim(), STEPS + 1)


@pytest.mark.parametrize(
    ("step", "learns"), [*((step, True) for step in range(1, STEPS)), *((step, False) for step in (3, 4, 5))]
)
def test_resume_at_every_boundary_equals_never_stopping(tmp_path, data, unbroken, step, learns):
    """And validation changes nothing: the unbroken run validates three times as often."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(Keep(unbroken[learns]).of(step), tmp_path / "checkpoints")
    train(tmp_path, data, estimators=LEARNED if learns else SETTLED)
    assert different(bits(unbroken[learns]), bits(tmp_path)) == []
    found = values(tmp_path, "val/nll")
    assert list(found) == [done - 1 for done in (3, 6, 9, 12) if done > step]
    assert found.items() <= values(unbroken[learns], "val/nll").items()


@pytest.mark.parametrize(
    "without",
    [replace(SCHEDULE, start=0), replace(SCHEDULE, ramp=0), replace(SCHEDULE, winq=WinQ(5, 0.4))],
    ids=["start", "ramp", "winq"],
)
def test_every_part_of_the_schedule_acts(tmp_path, data, unbroken, without):
    train(tmp_path, data, without)
    assert [n for n in different(bits(unbroken[True]), bits(tmp_path)) if n.endswith("q_proj.weight")]


def test_the_ramp_is_logged(unbroken):
    found = values(unbroken[True], "train/strength")
    assert [found[step] for step in range(STEPS)] == pytest.approx([SCHEDULE.strength(step) for step in range(STEPS)])


def test_scales_and_ranges_follow_until_the_freeze_and_are_learned_from_there(unbroken):
    kept = [torch.load(Keep(unbroken[True]).of(step), weights_only=True)["state_dict"] for step in range(1, STEPS)]
    name = "student.model.layers.0.mlp.up_proj"
    seen, low, scale, step, zero = (
        [state[f"{name}.{part}"] for state in kept]
        for part in (
            *("input_fake_quant.seen", "input_fake_quant.low"),
            *("weight_fake_quant.scale", "weight_fake_quant.log_step", "weight_fake_quant.zero_step"),
        )
    )
    assert [int(n) for n in seen] == [1, 1, 2, 3] + [3] * 7  # calibrated on one batch, then those of steps 2 and 3
    assert [bool((a != b).any()) for a, b in pairwise(low)] == [False, True, True] + [False] * 7
    assert not torch.equal(scale[2], scale[3])
    assert all(torch.equal(scale[3], later) for later in scale[4:])
    for learned in (step, zero):
        assert not any(bool(x.any()) for x in learned[:4])
        assert all(not torch.equal(a, b) for a, b in pairwise(learned[4:]))


class SaveFirst(Callback):
    """Saves as soon as Lightning lets anybody do anything after an optimizer step."""

    def __init__(self, path):
        self.path, self.before = path, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4:  # the step after which 5 are done
            state = optimizer.state_dict()["state"]
            self.before = {key: value["step"].item() for key, value in state.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def test_no_checkpoint_falls_between_a_step_and_its_reinitialisation(tmp_path, data, unbroken):
    first = SaveFirst(tmp_path / "first.ckpt")
    train(tmp_path, data, callbacks=[first])
    early, late = (torch.load(p, weights_only=True) for p in (first.path, Keep(unbroken[True]).of(5)))
    assert different(early["state_dict"], late["state_dict"]) == []
    plain = tmp_path / "plain"
    train(plain, data, replace(SCHEDULE, winq=WinQ(10, 0.5)), callbacks=[Keep(plain)])
    without = torch.load(Keep(plain).of(5), weights_only=True)
    moved = different(early["state_dict"], without["state_dict"])
    assert moved == [n for n in early["state_dict"] if n.endswith("_proj.weight")]  # the masters, and nothing else
    for ours, theirs in zip(*(c["optimizer_states"][0]["state"].values() for c in (early, without)), strict=True):
        assert different(ours, theirs) == []


@pytest.mark.parametrize("step", [1, 3, 5, 12])
def test_trainer_test_judges_a_checkpoint_as_it_would_be_served(data, unbroken, step):
    """Off, observing, on the ramp and at the end alike, in a Trainer that knows no optimizer step."""
    path = newest(unbroken[True] / "checkpoints") if step == STEPS else Keep(unbroken[True]).of(step)
    module = QATModule(student(), tiny(layers=1), Loss(), SCHEDULE, Optim(), STEPS)
    windows = TokenData(data, 32, 2, val_windows=1).val_dataloader()
    (batch,) = windows
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    (found,) = trainer.test(module, windows, ckpt_path=path, verbose=False)
    assert found["test/nll"] == values(unbroken[True], "val/nll")[step - 1]
    (again,) = trainer.test(module, windows, verbose=False)  # as it stands, without a checkpoint
    assert again == found
    tensors, folded, captured = certify(module, [batch], "32-true")
    assert captured["equal"] == 7
    for name, linear in fake_quants(module.student).items():
        now, _ = MinMax().qparams(linear.weight, tensors[name].scheme, torch.bfloat16)
        assert torch.equal(tensors[name].scale, now) is (step < 4)  # until the freeze, those of the weights as they are
    served = apply(tiny(layers=1), tensors, folded, recipe=STATIC)
    scores = evaluate(served, batch, None, 1)
    assert mean(scores.nll, scores.tokens) == pytest.approx(found["test/nll"], abs=1e-6)


def test_the_certificate_holds_whatever_the_schedule_was(tmp_path, data):
    module = train(tmp_path, data, replace(SCHEDULE, ramp=9))
    assert module.schedule.strength(STEPS - 1) == 1.0
    assert certify(module, [torch.arange(8)[None]], "32-true")[2]["equal"] == 7


def test_scales_that_follow_are_shared_as_they_are_served():
    """Query, key and value keep one global scale, gate and up another, in training and in the certificate."""
    nvfp4 = Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn")
    model = tiny(layers=1)
    prepare(model, Recipe({"a": Rule(".*_proj", nvfp4)}), MinMax(), Clipped())
    module = QATModule(model, tiny(layers=1), Loss(), PhaseSchedule(freeze=STEPS), Optim(), STEPS)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    module.as_trained()
    g = {name.rpartition(".")[2]: m.weight_fake_quant.global_scale for name, m in fake_quants(model).items()}
    assert torch.equal(g["q_proj"], g["k_proj"])
    assert torch.equal(g["v_proj"], g["k_proj"])
    assert torch.equal(g["gate_proj"], g["up_proj"])
    assert len({float(x) for x in g.values()}) == 4
    tensors, _, _ = certify(module, [torch.arange(8)[None]], "32-true")
    assert all(torch.equal(tensor.global_scale, g[name.rpartition(".")[2]]) for name, tensor in tensors.items())


class Plant(Callback):
    """Makes something not finite, before optimizer step `step` is taken or right after it."""

    def __init__(self, step, name, late):
        self.step, self.name, self.late = step, name, late

    def _plant(self, module):
        with torch.no_grad():
            module.student.get_parameter(self.name).view(-1)[0] = 1000.0 if "log" in self.name else float("nan")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.late and trainer.global_step == self.step:
            self._plant(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.late and trainer.global_step == self.step:
            self._plant(pl_module)


MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("name", "late", "kept", "words"),
    [
        (f"{MLP}.up_proj.weight", False, 6, rf"loss is nan at step 6 \({MLP}\.up_proj\.weight is not finite\)"),
        (f"{MLP}.up_proj.weight", True, 5, rf"{MLP}\.up_proj\.weight is not finite after step 6; the last checkpoint"),
        (
            *(f"{MLP}.up_proj.weight_fake_quant.log_step", True, 5),
            rf"the scale of {MLP}\.up_proj\.weight_fake_quant is not finite after step 6; the last checkpoint is kept",
        ),
    ],
    ids=["before a step", "by a step", "a scale by a step"],
)
def test_the_last_good_checkpoint_outlives_what_is_not_finite(tmp_path, data, unbroken, name, late, kept, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, data, callbacks=[Plant(6, name, late)])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step={kept}.ckpt"]
    train(tmp_path, data)
    assert different(bits(unbroken[True]), bits(tmp_path)) == []


def test_another_schedule_refuses_the_checkpoint(tmp_path, data, unbroken):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(Keep(unbroken[True]).of(6), tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"schedule is .*'ramp': 5, .*, not .*'ramp': 4, .*; use resume=never"):
        train(tmp_path, data, replace(SCHEDULE, ramp=4))
