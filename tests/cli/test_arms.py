import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.utils import instantiate

from qat.cli import arms
from qat.cli.arms import _progress, judged, train
from qat.cli.exporting import export
from qat.evaluation.divergence import Scores
from qat.formats import compressed_tensors
from qat.surgery.changes import Changes

pytestmark = pytest.mark.whole

BENCH = SimpleNamespace(config={"seed": 3})
SPENT = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_mem_mb": 3}


def scores(nll, kl=None, agree=None):
    double = [None if part is None else torch.tensor(part, dtype=torch.float64) for part in (nll, kl, agree)]
    return Scores(10, *double)


def test_an_entry_of_the_summary():
    fp = judged(BENCH, scores([20.0, 30.0, 40.0]), None, 100, 16, 16, SPENT, [])
    rows = [{"name": "a.b", "fallback": "singular"}]
    arm = judged(BENCH, scores([22.0, 32.0, 45.0], [1.0, 2.0, 3.0], [9, 8, 10]), fp, 50, 5.5, 4.5, SPENT, rows)
    assert arm["nll"] == pytest.approx(3.3)
    assert arm["ppl"] == pytest.approx(27.1126, rel=1e-4)
    assert arm["kl"] == pytest.approx(0.2)
    assert arm["top1_agree"] == pytest.approx(0.9)
    assert arm["tokens"] == 30
    assert arm["nll_se"] == pytest.approx(torch.tensor([0.2, 0.2, 0.5]).std().item() / 3**0.5)
    assert (arm["bytes"], arm["bits_per_weight"], arm["bits_per_quantized_weight"]) == (50, 5.5, 4.5)
    assert (arm["seed"], arm["fallbacks"], arm["seconds"]) == (3, ["a.b"], 1.0)
    assert arm["windows"] == {"nll": [22.0, 32.0, 45.0], "kl": [1.0, 2.0, 3.0]}


def test_full_precision_diverges_from_nothing():
    fp = judged(BENCH, scores([20.0, 30.0]), None, 100, 16, 16, SPENT, [])
    assert (fp["kl"], fp["top1_agree"], fp["windows"]["kl"]) == (0.0, 1.0, None)
    assert fp["nll_se"] == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_cannot_be_judged(bad):
    with pytest.raises(ValueError, match="not finite on the test windows; nothing can be judged"):
        judged(BENCH, scores([20.0, bad]), None, 100, 16, 16, SPENT, [])


def test_progress_is_said_about_five_times_and_at_the_end(capsys):
    show = _progress("gptq")
    for done in range(1, 31):
        show(done, 30)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1] == "  gptq: block 30/30"
    _progress("awq")(1, 1)
    assert capsys.readouterr().out == "  awq: block 1/1\n"


@pytest.mark.parametrize("changed", [False, True])
def test_the_reference_is_the_training_graphs_own(bench, monkeypatch, changed):
    """A norm that `convert` returns otherwise than it trained is in the file and in its digests; the logits tell."""
    certify = arms.certify

    def forged(*args):
        tensors, folded, captured = certify(*args)
        return tensors, folded | {"model.norm.weight": folded["model.norm.weight"] * 2}, captured

    monkeypatch.setattr(arms, "certify", forged if changed else certify)
    tensors, folded, sequences, captured, _ = train(bench, [])
    found = export(bench, "qat", tensors, folded, sequences, captured)
    assert found["codes_equal"]
    assert found["verified"] is not changed


STILL = ("optim.lr=1e-30", "optim.scale_lr=1e-30", "trainer.max_steps=1")


def load(run):
    return json.loads((run.path / "summary.json").read_text())


@pytest.fixture(scope="module")
def blockap(finish):
    """Block-AP as an arm, and QAT from there that does not move."""
    return finish("run", "init=blockwise", "+method@arms.blockap=blockwise", "~arms.awq", *STILL)


@pytest.mark.parametrize("arm", ["gptq", "blockap"])
def test_training_starts_where_the_arm_of_the_same_settings_ended(finish, blockap, arm):
    """Step 0 has its codes, norms and scales, so a training that does not move is that arm; nothing is found twice."""
    run = blockap if arm == "blockap" else finish("run", "init=gptq", "~arms.awq", *STILL)
    arms = load(run)["arms"]
    assert arms["qat"]["windows"] == arms[arm]["windows"]
    assert arms["rtn"]["windows"] != arms[arm]["windows"]
    assert run.out.count(f"{arm}: block 1/1") == 1
    assert load(run)["export"]["verified"]
    stores = {path.name for path in (run.path / "checkpoints").iterdir() if path.is_dir()}
    assert stores == {"gptq", arm}


def test_block_wise_training_is_an_arm_and_no_candidate_for_the_best_method_without_training(blockap):
    summary = load(blockap)
    assert set(summary["arms"]) == {"fp", "rtn", "gptq", "blockap", "qat"}
    assert summary["recovered"]["vs_best_ptq"]["candidates"] == ["rtn", "gptq"]


def test_other_settings_are_another_start(finish):
    run = finish("run", "init=gptq", "init.method.damping=0.5", "~arms.awq", "~arms.rtn", *STILL)
    assert {path.name for path in (run.path / "checkpoints").iterdir() if path.is_dir()} == {"gptq", "init_gptq"}
    arms = load(run)["arms"]
    assert arms["qat"]["windows"] != arms["gptq"]["windows"]


def test_scales_alone_after_block_wise_training_keep_its_codes(finish, tmp_path):
    """EfficientQAT whole: Block-AP, then E2E-QP; the certificate holds, and the codes are those of the first stage."""
    run = finish("train", "init=blockwise", "optim.train=scales", "optim.scale_lr=0.05", "trainer.max_steps=3")
    assert load(run)["export"]["verified"]
    stored = Changes.load(
        run.path / "checkpoints/init_blockwise/block-0000.safetensors",
        instantiate(yaml.safe_load((run.path / "config.yaml").read_text())["recipe"], _convert_="all"),
        "cpu",
    )
    exported = compressed_tensors.load(load(run)["export"]["path"]).tensors
    assert exported.keys() == stored.tensors.keys()
    for name, tensor in stored.tensors.items():
        assert torch.equal(tensor.codes, exported[name].codes)
        assert not torch.equal(tensor.scale, exported[name].scale)


def test_every_arm_leaves_the_model_as_it_was(finished, root):
    """The run's fp arm and the model's own file agree after all the other arms have come and gone."""
    from qat.data.text import load
    from qat.evaluation.divergence import evaluate, mean
    from qat.models import hf

    model, _ = hf.load("tiny", str(root / "model"))
    windows = load(root / "tokens").windows("test", 32, 4)
    fp = json.loads((finished.path / "summary.json").read_text())["arms"]["fp"]
    own = evaluate(model, windows, None, 2)
    assert fp["nll"] == mean(own.nll, own.tokens)
