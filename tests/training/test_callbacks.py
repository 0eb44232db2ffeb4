from types import SimpleNamespace

import pytest
import torch

from qat.training.callbacks import TrainingProgress


def drive(progress, steps, start=0):
    logged = []
    module = SimpleNamespace(log=lambda name, value: logged.append((name, value)))
    metrics = {"train/loss": torch.tensor(0.25)}
    trainer = SimpleNamespace(
        global_step=start, is_global_zero=True, max_steps=steps, callback_metrics=metrics,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
    )  # fmt: skip
    progress.on_train_start(trainer, module)
    for step in range(start + 1, steps + 1):
        trainer.global_step = step
        progress.on_train_batch_end(trainer, module, None, None, step)
        if step == 3:
            metrics["val/ppl"] = torch.tensor(12.5)
            progress.on_validation_end(trainer, module)
    progress.on_train_end(trainer, module)
    return logged


def test_plain_lines_away_from_a_terminal(capsys):
    logged = drive(TrainingProgress(100, every=2), 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "3/5", "4/5", "5/5"]
    assert "loss 0.2500" in lines[0]
    assert "tok/s" in lines[0]
    assert lines[1] == "  step 3/5  val ppl 12.500"
    assert "val ppl" not in lines[2], "an old perplexity is not the step's"
    assert len(logged) == 5
    assert all(name == "train/tokens_per_second" and value > 0 for name, value in logged)


def test_a_resumed_run_says_so(capsys):
    drive(TrainingProgress(100, every=10), 5, start=3)
    assert capsys.readouterr().out.splitlines()[0] == "  resumed at step 3"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    progress = TrainingProgress(100, every=2)
    drive(progress, 4)
    assert progress._bar is None
    assert "step 2/4" not in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_closes_the_bar(monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    progress = TrainingProgress(100, every=2)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, max_steps=4)
    progress.on_train_start(trainer, None)
    progress.on_exception(trainer, None, ValueError())
    assert progress._bar is None
