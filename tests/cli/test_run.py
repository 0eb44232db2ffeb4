"""`qat run` from end to end, tiny; what it leaves behind; and that whatever stops it leaves a run that goes on."""

import gc
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import arguments

from qat.cli import arms as module
from qat.cli import run
from qat.cli.main import main
from qat.engine.loader import open_checkpoint
from qat.evaluation.verify import _files
from qat.formats import compressed_tensors
from qat.report.card import number_rows

pytestmark = pytest.mark.whole

ARMS = ["fp", "rtn", "gptq", "awq", "qat"]
ARM = {
    *("ppl", "nll", "nll_se", "tokens", "kl", "top1_agree", "bits_per_weight", "bits_per_quantized_weight", "bytes"),
    *("seconds", "cpu_seconds", "peak_mem_mb", "seed", "fallbacks", "windows"),
}
EXPORT = {
    *("path", "verified", "codes_equal", "files_changed", "weights_equal"),
    *("max_abs_logit_diff", "max_kl", "greedy_equal", "fast_path"),
}


def load(path, name="summary.json"):
    return json.loads((path / name).read_text())


@pytest.fixture
def start(root, tmp_path, monkeypatch, capsys):
    """Runs `qat run` in runs of its own: status, stdout and stderr."""
    monkeypatch.setenv("QAT_RUNS", str(tmp_path / "runs"))

    def go(*more, verb="run"):
        status = main(arguments(root, verb, *more))
        gc.collect()  # Lightning's cycles would hold the lock, as a process does until it ends
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return go


def test_block_wise_training_is_no_ptq_arm_even_after_a_rotation():
    ptq, trained = {"_target_": "qat.ptq.gptq.gptq"}, {"_target_": "qat.training.blockwise.blockwise"}
    rotate = {"_target_": "qat.ptq.rotate.rotate"}
    methods = {"a": ptq, "b": trained, "c": rotate | {"then": None}, "d": rotate | {"then": ptq},
               "e": rotate | {"then": trained}, "f": rotate | {"then": rotate | {"then": trained}}}  # fmt: skip
    assert run._ptq(methods) == ["a", "c", "d"]
    methods["e"] = {"_target_": "qat.training.blockwise.blockwise", "signed": True}  # AutoRound
    assert run._ptq(methods) == ["a", "c", "d", "e"]


def test_the_summary_has_the_documented_keys(finished):
    summary = load(finished.path)
    assert list(summary["arms"]) == ARMS
    for arm in summary["arms"].values():
        assert arm.keys() == ARM
    assert summary["recovered"].keys() == {"vs_rtn", "vs_gptq", "vs_awq", "vs_best_ptq"}
    best = summary["recovered"]["vs_best_ptq"]
    assert best.keys() == {"kl", "nll", "candidates"}
    assert best["kl"].keys() == {"value", "winner"}
    assert summary["export"].keys() == EXPORT
    assert summary["cost"].keys() >= {"steps", "tokens", "seconds"}
    assert summary["warnings"] == [] or all(isinstance(line, str) for line in summary["warnings"])
    assert len(summary["continuations"]) == 3


def test_the_numbers_are_what_they_are_called(finished):
    arms = load(finished.path)["arms"]
    assert arms["fp"]["kl"] == 0
    assert arms["fp"]["top1_agree"] == 1
    assert arms["fp"]["bits_per_weight"] == 16
    for name, arm in arms.items():
        windows = torch.tensor(arm["windows"]["nll"], dtype=torch.float64)
        assert arm["tokens"] == 4 * 31
        assert arm["nll"] == pytest.approx(float(windows.sum()) / arm["tokens"])
        assert arm["ppl"] == pytest.approx(math.exp(arm["nll"]))
        if name != "fp":
            assert arm["kl"] == pytest.approx(sum(arm["windows"]["kl"]) / arm["tokens"])
            assert arm["kl"] > 0
            assert arm["bits_per_quantized_weight"] == 4.5  # 4 bits, and a bf16 scale for 32 of them
            difference = (windows - torch.tensor(arms["fp"]["windows"]["nll"], dtype=torch.float64)) / 31
            assert arm["nll_se"] == pytest.approx(float(difference.std()) / 2)
        assert arm["seed"] == 1234


def test_bytes_are_those_of_the_file(finished):
    size = (finished.path / "export/compressed_tensors/model.safetensors").stat().st_size
    assert load(finished.path)["arms"]["qat"]["bytes"] == size


def test_the_export_is_verified_and_loads(finished):
    export = load(finished.path)["export"]
    assert export["verified"]
    assert export["codes_equal"]
    assert export["weights_equal"]
    assert export["greedy_equal"]
    assert export["fast_path"]["passed"]
    certificate = load(Path(export["path"]), "verify.json")
    assert certificate["arm"] == "qat"
    assert certificate["checks"]["captured"] == {"modules": 7, "equal": 7, "dtype": "float32", "passed": True}
    checkpoint = compressed_tensors.load(export["path"])
    assert len(checkpoint.tensors) == 7
    assert checkpoint.config["dtype"] == "bfloat16"


def test_the_card_has_the_summarys_numbers(finished):
    """It came after the certificate, whose files still are what they were; recipe and serve files are bound by it."""
    path, arms = finished.path / "export" / "compressed_tensors", load(finished.path)["arms"]
    text = (path / "README.md").read_text()
    for name, row in zip(("fp", "rtn", "gptq", "awq", "**qat**"), number_rows(arms, "qat"), strict=True):
        assert row[0] == name
        assert f"| {' | '.join(row)} |" in text
    assert f"{arms['qat']['ppl']:.3f}" in text
    assert load(finished.path, "run.json")["data"]["fingerprint"] in text
    certificate = load(path, "verify.json")
    assert {"recipe.yaml", "serve/vllm.yaml", "serve/ray_serve.py"} < certificate["files"].keys()
    assert "README.md" not in certificate["files"]
    checkpoint = open_checkpoint(path)
    assert _files(checkpoint, certificate["files"])["passed"]
    assert "serve/sglang.sh" not in certificate["files"]  # 64 in-features fill none of its tiles
    assert "SGLang: not served. model.layers.0." in text


def test_the_run_directory_is_complete(finished):
    path = finished.path
    names = {"config.yaml", "run.json", "metrics.jsonl", "summary.json", "checkpoints", "export", "plots"}
    assert names <= {entry.name for entry in path.iterdir()}
    facts = load(path, "run.json")
    assert facts["status"] == "finished"
    assert facts["seed"] == 1234
    assert facts["data"]["fingerprint"]
    assert facts["threads"] == torch.get_num_threads()
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 1  # of steps 0 and 1
    assert [p.name for p in sorted((path / "plots").iterdir())] == ["kl_vs_size.png", "ppl_vs_size.png"]
    assert not list(path.rglob("*.part"))


def test_what_it_prints(finished):
    for words in (
        *(f"run directory: {finished.path} (new)", "calibration 64 tokens, judged on 128 test tokens"),
        *("int4_g32", "tied to model.embed_tokens", "step 2/2", "train == serve: VERIFIED", "qat verify run=latest"),
        *(f"\n{name}: " for name in ARMS),
    ):
        assert words in finished.out, words


def test_a_finished_run_is_not_used_again(finished, root, monkeypatch, capsys):
    assert main(arguments(root, "run", f"runs={finished.runs}", "dry_run=true")) == 0
    assert "(new)" in capsys.readouterr().out
    assert (finished.runs / "latest").resolve() == finished.path


def test_dry_run_stops_after_the_plan(start, monkeypatch):
    monkeypatch.setattr(run, "full_precision_arm", lambda bench: pytest.fail("computed something"))
    status, out, _ = start("dry_run=true", "export.target=vllm")
    assert status == 0
    assert "int4_g32" in out
    assert re.search(r"\n  q_proj +\[64, 64\] +x 1 +Marlin\n", out)
    *_, rtn, gptq, _, trained = out.splitlines()
    assert rtn == "rtn: observer=MinMax"
    assert gptq.startswith("gptq: observer=MSE, act_order=static, groups=static, ")
    assert re.fullmatch(r"qat: 2 steps of \d+ x \d+ tokens on kl, from \w+, estimator lsq, schedule learn", trained)


class Stopped(ValueError):
    """Whatever stops a run."""


def stop(*_, **__):
    raise Stopped("stopped here")


def test_an_interrupted_run_goes_on_by_arm_and_by_step(start, tmp_path, monkeypatch, finished):
    """Stopped in its second post-training method, then after its training; the end is that of an unbroken run."""
    method, export = module.quantize, module.export
    monkeypatch.setattr(module, "quantize", lambda bench, name, m: method(bench, name, m) if name == "rtn" else stop())
    status, _, err = start()
    assert (status, err) == (1, "qat run: stopped here\n")
    path = (tmp_path / "runs" / "latest").resolve()
    assert list(load(path)["arms"]) == ["fp", "rtn"]
    assert load(path, "run.json")["status"] == "running"

    monkeypatch.setattr(module, "quantize", method)
    monkeypatch.setattr(module, "export", stop)
    status, out, _ = start()
    assert status == 1
    assert f"run directory: {path} (resumed)" in out
    assert "\nrtn: " not in out
    assert "\ngptq: " in out
    assert [p.name for p in (path / "checkpoints").glob("step=*")] == ["step=2.ckpt"]

    monkeypatch.setattr(module, "export", export)
    monkeypatch.setattr("qat.report.plots.draw", lambda *_: [])  # as without matplotlib
    status, out, _ = start()
    assert status == 0
    assert "no plots: they need matplotlib (pip install 'qat[report]')" in out
    assert "\nawq: " not in out
    assert "step 2/2" not in out
    facts = load(path, "run.json")
    assert (facts["status"], facts["resumed"]) == ("finished", 2)
    mine, whole = load(path)["arms"], load(finished.path)["arms"]
    assert list(mine) == ARMS
    for name in ARMS:
        assert mine[name]["windows"] == whole[name]["windows"], name


def test_an_interrupt_is_130_and_can_be_resumed(start, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "ptq_arm", interrupt)
    status, _, err = start()
    assert (status, err) == (130, "qat run: interrupted; the same command goes on from there\n")
    assert load((tmp_path / "runs" / "latest").resolve(), "run.json")["status"] == "running"


def test_a_loss_that_is_not_finite_is_one_sentence(start, tmp_path, monkeypatch):
    from qat.training import module

    call = module.chunked_loss

    def broken(*args):
        parts = call(*args)
        return parts | {"loss": parts["loss"] * float("nan")}

    monkeypatch.setattr(module, "chunked_loss", broken)
    status, _, err = start(verb="train")
    assert status == 1
    assert err.startswith("qat train: loss is nan at step 0; the last checkpoint is kept. Lower optim.lr")
    assert err.count("\n") == 1
    path = (tmp_path / "runs" / "latest").resolve()
    assert load(path, "run.json")["status"] == "running"
    assert list(load(path)["arms"]) == ["fp"]
    monkeypatch.setattr(module, "chunked_loss", call)
    status, out, _ = start(verb="train")
    assert status == 0
    assert f"{path} (resumed)" in out


def test_training_that_diverges_is_one_sentence(start):
    status, _, err = start("optim.lr=1e30", "trainer.max_steps=6", verb="train")
    assert status == 1
    assert err.count("\n") == 1
    assert "resume=never" in err


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(start, tmp_path, monkeypatch):
    def full(parts, path, *_):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("qat.surgery.changes.save_file", full)
        status, _, err = start()
    assert status == 1
    assert err.startswith("qat run: the disk is full at ")
    assert err.count("\n") == 1
    path = (tmp_path / "runs" / "latest").resolve()
    assert list(load(path)["arms"]) == ["fp", "rtn"]
    monkeypatch.setattr(run, "qat_arm", stop)
    _, out, _ = start()
    assert f"{path} (resumed)" in out
    assert list(load(path)["arms"]) == ["fp", "rtn", "gptq", "awq"]


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["model.path=/nowhere/model"], 2, "model.path: "),
        (["data.path=/nowhere/tokens"], 2, "data.path: /nowhere/tokens is no directory"),
        (["data.seq_len=512"], 2, "data.seq_len: 512 tokens, but the model's context ends at 256"),
        (["recipe=w4a16_g128", "recipe.rules.linears.weight.granularity.group_size=48"], 2, "divide"),
        (["calibration.samples=65"], 1, "calibration.samples=65: the train split has 64 windows of 32 tokens"),
        (["evaluation.windows=9"], 1, "split test has 256 tokens, 8 windows of 32; 9 asked for"),
    ],
)
def test_bad_input_is_said_before_a_run_directory_is_made(start, tmp_path, more, status, words):
    found, _, err = start(*more)
    assert found == status, err
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_no_model(start, tmp_path):
    (tmp_path / "notes.gguf").write_text("not a model")
    (tmp_path / "empty").mkdir()
    for name, words in (("notes.gguf", "GGUF"), ("empty", "config.json")):
        status, _, err = start(f"model.path={tmp_path / name}")
        assert status == 2
        assert words in err
        assert "Traceback" not in err


def test_a_model_whose_weights_are_damaged(start, tmp_path, root):
    copy = shutil.copytree(root / "model", tmp_path / "model")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, err = start(f"model.path={copy}")
    assert status in (1, 2)
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2


def test_an_empty_text(start, tmp_path):
    (tmp_path / "empty.txt").touch()
    status, _, err = start("data=text", "data.path=null", f"data.source.train={tmp_path / 'empty.txt'}")
    assert status == 1
    assert "too few to cut" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_runs_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = start(f"runs={tmp_path / 'file'}")
    assert status == 1
    assert "choose another directory (runs=DIR, or QAT_RUNS)" in err
    assert err.count("\n") == 1


def test_an_export_that_is_not_verified_fails_the_command(start, monkeypatch):
    from qat.cli import exporting

    verify = exporting.verify
    monkeypatch.setattr(exporting, "verify", lambda *a: verify(*a) | {"verified": False})
    status, out, _ = start(verb="ptq")
    assert status == 1
    assert "NOT VERIFIED" in out


def test_a_mix_with_cross_entropy_is_not_judged_against_full_precision(start, tmp_path):
    status, out, _ = start("loss=ce_kl")
    assert status == 0
    assert "recovered" not in load(tmp_path / "runs" / "latest")
    assert "nothing is said of recovered losses" in out
