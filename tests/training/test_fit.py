"""Law (h): resume at step k == never stopped."""

import copy
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from tiny import embedded, recipe, tiny, tokens

from qat.nn.adapter import LoRA, QLoRA
from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.observers.minmax import MinMax
from qat.surgery.adapt import add_lora, prepare_qlora
from qat.surgery.convert import convert
from qat.surgery.prepare import prepare
from qat.training.checkpoints import newest
from qat.training.fit import Training, fit
from qat.training.losses import Loss
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule

STEPS = 6
LOSS, SCHEDULE = Loss(kl=1.0, ce=0.5), PhaseSchedule(start=1, freeze=3)


class Killed(Exception):
    """Stands for SIGKILL: nothing runs after it but what Lightning cannot help."""


class Kill(Callback):
    """Dies at the end of an optimizer step, before its checkpoint if `late` is false."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tokens(tmp_path_factory.mktemp("tokens"))


def train(
    directory: Path,
    data,
    kill_at=None,
    estimator=None,
    accumulate=2,
    loss=LOSS,
    every=1,
    lr=1e-3,
    teacher=True,
    rules=None,
    train_embeddings=False,
    parts="all",
    schedule=SCHEDULE,
    adapter=None,
    **model,
):
    full = tiny(**model)
    student = copy.deepcopy(full)
    if isinstance(adapter, QLoRA):
        prepare_qlora(student, recipe(3), adapter)
    else:
        prepare(student, rules or recipe(3), MinMax(), estimator or LSQ(), train_embeddings=train_embeddings)
        if adapter is not None:
            add_lora(student, adapter)
    training = Training(
        max_steps=STEPS,
        batch_size=2,
        seq_len=32,
        accumulate=accumulate,
        checkpoint_every=every,
        val_every=2,
        val_windows=2,
    )
    optim = Optim(lr=lr, scale_lr=10 * lr, train=parts)
    callbacks = [Kill(kill_at)] if kill_at is not None else []
    fit(
        student, full if teacher else None, data, training, loss, schedule, optim, directory, torch.device("cpu"),
        callbacks=callbacks,
    )  # fmt: skip
    return student


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("estimator", [LSQ(), StraightThrough()])
def test_resume_at_every_step_equals_never_stopping(tmp_path, data, accumulate, estimator):
    unbroken = train(tmp_path / "unbroken", data, accumulate=accumulate, estimator=estimator)
    for step in (1, 3, 5) if accumulate == 2 else (2, 4):  # 1 and 3 are the schedule's own boundaries
        directory = tmp_path / f"broken{step}"
        with pytest.raises(Killed):
            train(directory, data, kill_at=step, accumulate=accumulate, estimator=estimator)
        assert newest(directory / "checkpoints").stem == f"step={step}"
        resumed = train(directory, data, accumulate=accumulate, estimator=estimator)
        assert same(unbroken, resumed) == []
        lines = [(tmp_path / d / "metrics.jsonl").read_text().splitlines() for d in ("unbroken", directory.name)]
        losses = [[line for line in part if "train/loss" in line] for part in lines]
        assert len(losses[0]) == len(losses[1]) == STEPS


def test_a_tied_pair_resumes_and_trains_as_one_table(tmp_path, data):
    """Tokens that never come up move as well: the head multiplies by all rows."""
    quantized = {"rules": embedded(bits=3), "train_embeddings": True}
    unbroken = train(tmp_path / "unbroken", data, **quantized)
    with pytest.raises(Killed):
        train(tmp_path / "broken", data, kill_at=4, **quantized)
    assert same(unbroken, train(tmp_path / "broken", data, **quantized)) == []
    table, head = unbroken.model.embed_tokens, unbroken.lm_head
    assert head.weight is table.weight
    assert head.weight_fake_quant is table.weight_fake_quant
    assert bool(table.weight_fake_quant.log_step.all())
    assert bool((table.weight != tiny().lm_head.weight).any(-1).all())
    frozen = train(tmp_path / "frozen", data, rules=embedded(bits=3))
    assert torch.equal(frozen.lm_head.weight, tiny().lm_head.weight)
    assert bool(frozen.lm_head.weight_fake_quant.log_step[1:].all())  # row 0, of padding, is all zero


def test_resume_from_an_older_checkpoint_takes_the_same_batches(tmp_path, data):
    unbroken = train(tmp_path / "unbroken", data)
    with pytest.raises(Killed):
        train(tmp_path / "broken", data, kill_at=5, every=2)
    assert newest(tmp_path / "broken" / "checkpoints").stem == "step=4"
    assert same(unbroken, train(tmp_path / "broken", data, every=2)) == []


def test_random_numbers_go_on_where_they_stopped(tmp_path, data):
    """Dropout draws in every step, so a resumed run needs the random state of the checkpoint."""
    unbroken = train(tmp_path / "unbroken", data, attention_dropout=0.2)
    assert same(unbroken, train(tmp_path / "certain", data)) != []  # dropout acts
    with pytest.raises(Killed):
        train(tmp_path / "broken", data, kill_at=3, attention_dropout=0.2)
    assert same(unbroken, train(tmp_path / "broken", data, attention_dropout=0.2)) == []


def test_training_changes_what_it_should_and_only_that(tmp_path, data):
    full = tiny()
    before = copy.deepcopy(full)
    student = train(tmp_path, data)
    tensors, folded = convert(student)
    assert same(before, full) == []
    assert set(tensors) == {n for n, m in full.named_modules() if n.endswith("_proj")}
    assert set(folded) == {n for n, _ in full.named_parameters() if "norm" in n}
    assert all(v.dtype == torch.bfloat16 for v in folded.values())
    moved = [
        n for n, t in tensors.items() if not torch.equal(t.dequantize(torch.float32), full.get_parameter(f"{n}.weight"))
    ]
    assert len(moved) == len(tensors)
    steps = [m.log_step for m in student.modules() if hasattr(m, "log_step")]
    assert all(bool((step != 0).any()) for step in steps)
    assert torch.equal(student.get_input_embeddings().weight, full.get_input_embeddings().weight)


def test_law_c_qat_with_lr_0_and_minmax_start_is_rtn(tmp_path, data):
    from qat.numerics.affine import rtn

    student = train(tmp_path, data, lr=0.0)
    tensors, folded = convert(student)
    full = tiny()
    for name, tensor in tensors.items():
        codes, scale, _ = rtn(full.get_parameter(f"{name}.weight"), tensor.scheme, torch.bfloat16)
        assert torch.equal(tensor.codes, codes)
        assert torch.equal(tensor.scale, scale)
    assert all(torch.equal(v.float(), full.get_parameter(n)) for n, v in folded.items())


@pytest.mark.parametrize("estimator", [LSQ(), StraightThrough()])
def test_scales_alone_train_and_no_code_moves_and_a_resumed_run_is_unbroken(tmp_path, data, estimator):
    start = tiny()
    prepare(start, recipe(3), MinMax(), estimator)
    begun, _ = convert(start)
    how = {"parts": "scales", "schedule": PhaseSchedule(), "estimator": estimator, "lr": 1e-2}
    unbroken = train(tmp_path / "unbroken", data, **how)
    tensors, folded = convert(unbroken)
    for name, tensor in begun.items():
        assert torch.equal(tensor.codes, tensors[name].codes)
        assert not torch.equal(tensor.scale, tensors[name].scale)
    assert all(
        torch.equal(value.float(), start.get_parameter(f"{name.rpartition('.')[0]}.parametrizations.weight.original"))
        for name, value in folded.items()
    )
    with pytest.raises(Killed):
        train(tmp_path / "broken", data, kill_at=3, **how)
    assert same(unbroken, train(tmp_path / "broken", data, **how)) == []


def test_scales_that_follow_the_weights_cannot_train_alone(tmp_path, data):
    with pytest.raises(ValueError, match=r"schedule\.freeze=3: .*optim\.train=scales"):
        train(tmp_path, data, parts="scales")


ADAPTERS = [LoRA(rank=2, alpha=4.0), QLoRA(rank=2, alpha=4.0, group_size=32, dropout=0.2)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_adapters_resume_exactly_from_checkpoints_without_the_base(tmp_path, data, adapter):
    unbroken = train(tmp_path / "unbroken", data, adapter=adapter, lr=1e-2)
    for step in (1, 3):
        directory = tmp_path / f"broken{step}"
        with pytest.raises(Killed):
            train(directory, data, kill_at=step, adapter=adapter, lr=1e-2)
        assert same(unbroken, train(directory, data, adapter=adapter, lr=1e-2)) == []
    trained = {name: p for name, p in unbroken.named_parameters() if p.requires_grad}
    checkpoint = torch.load(newest(tmp_path / "unbroken" / "checkpoints"), weights_only=True)
    held = {name.removeprefix("student.") for name in checkpoint["state_dict"]}
    assert held - set(trained) == {name for name in held if "fake_quant" in name} - set(trained)
    assert set(trained) <= held
    states = checkpoint["optimizer_states"][0]["state"].values()
    assert sum(state["exp_avg"].numel() for state in states) == sum(p.numel() for p in trained.values())
    start = tiny().state_dict()
    kept = {name: value for name, value in unbroken.state_dict().items() if name in start}
    assert kept
    assert all(torch.equal(value, start[name]) for name, value in kept.items())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_adapters_of_another_base_are_refused(tmp_path, data, adapter):
    with pytest.raises(Killed):
        train(tmp_path, data, kill_at=3, adapter=adapter)
    path = newest(tmp_path / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    name = next(n for n in checkpoint["qat_frozen"] if n.endswith(("up_proj.weight", "up_proj.words")))
    checkpoint["qat_frozen"][name] += 1
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"{name}: the checkpoint's adapters .* resume=never"):
        train(tmp_path, data, adapter=adapter)


def test_nan_stops_at_once_and_keeps_the_checkpoint(tmp_path, data):
    with pytest.raises(Killed):
        train(tmp_path, data, kill_at=4)
    path = newest(tmp_path / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if n.endswith("q_proj.weight"))
    checkpoint["state_dict"][name][0, 0] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"at step 4 .*q_proj.* is not finite.*optim.lr"):
        train(tmp_path, data)
    assert newest(tmp_path / "checkpoints") == path


def test_cross_entropy_alone_needs_no_teacher(tmp_path, data):
    train(tmp_path, data, loss=Loss(kl=0.0, ce=1.0), teacher=False)
    with pytest.raises(ValueError, match="needs the full-precision teacher"):
        train(tmp_path / "other", data, teacher=False)


def test_checkpoints_hold_no_teacher_and_load_without_unpickling(tmp_path, data):
    train(tmp_path, data)
    checkpoint = torch.load(newest(tmp_path / "checkpoints"), weights_only=True)
    assert not [n for n in checkpoint["state_dict"] if "teacher" in n]
    assert checkpoint["qat_phase"] == "learn"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step={STEPS}.ckpt"]
