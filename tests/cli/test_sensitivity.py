import json
import math

import pytest
import yaml
from tiny_run import arguments

from qat.cli import sensitivity
from qat.cli.main import main
from qat.numerics.allocate import monotone

pytestmark = pytest.mark.whole

SMALL = ("observer.points=4", "bits=[2,3,4]", "budget=4", "evaluation={windows: 3, seq_len: 32, batch_size: 2}")


@pytest.fixture(scope="module")
def done(finish):
    """One layer, seven linears, groups of 32: widths take 2.5, 3.5 and 4.5 bits."""
    return finish("sensitivity", *SMALL)


def read(run, name="sensitivity.json"):
    return json.loads((run.path / name).read_text())


def bits(recipe):
    return sorted({rule["weight"]["grid"]["bits"] for rule in recipe["rules"].values() if rule["weight"]})


def go(done, *more):
    """The verb once more, in the runs of the finished one: its status, and the directory of the run."""
    texts = [text for text in SMALL if not any(other.startswith(text.partition("=")[0]) for other in more)]
    status = main(arguments(done.root, "sensitivity", f"runs={done.runs}", *texts, *more))
    return status, (done.runs / "latest").resolve()


def test_every_unit_has_its_losses_at_every_width(done):
    state = read(done)
    assert len(state["units"]) == 7
    for name, unit in state["units"].items():
        assert unit["modules"] == [name]
        assert list(unit["widths"]) == ["2", "3", "4"]
        losses = [cell["kl"] for cell in unit["widths"].values()]
        assert [cell["loss"] for cell in unit["widths"].values()] == pytest.approx(monotone(losses))
        for cell in unit["widths"].values():
            assert cell["kl"] == pytest.approx(sum(cell["windows"]["kl"]) / 2)
            assert cell["nll_se"] > 0
        assert unit["widths"]["3"]["bits"] == unit["weights"] * 3.5


def test_the_budget_is_met_and_nothing_that_fits_loses_less(done):
    chosen, units = read(done)["allocation"], read(done)["units"]
    assert chosen["bits_per_quantized_weight"] <= 4
    assert chosen["bits_per_quantized_weight"] > 3.5
    picked = [unit["widths"][str(unit["chosen"])] for unit in units.values()]
    assert sum(cell["loss"] for cell in picked) == pytest.approx(chosen["loss"])
    assert chosen["bound"] <= chosen["loss"]
    weights = sum(unit["weights"] for unit in units.values())
    assert sum(cell["bits"] for cell in picked) == chosen["bits_per_quantized_weight"] * weights


def test_whole_recipes_are_judged_beside_each_other_on_the_validation_split(done):
    arms = read(done, "summary.json")["arms"]
    assert list(arms) == ["fp", "w2", "w3", "w4", "mixed"]
    assert [arms[name]["bits_per_quantized_weight"] for name in ("w2", "w3", "w4")] == [2.5, 3.5, 4.5]
    assert arms["mixed"]["bits_per_quantized_weight"] == read(done)["allocation"]["bits_per_quantized_weight"]
    assert arms["w2"]["kl"] > arms["w3"]["kl"] > arms["mixed"]["kl"] > arms["w4"]["kl"] > 0
    versus = read(done)["versus"]
    assert versus["arm"] == "w3"
    assert versus["kl_saved"] == pytest.approx(arms["w3"]["kl"] - arms["mixed"]["kl"])
    differences = [a - b for a, b in zip(*(arms[n]["windows"]["kl"] for n in ("w3", "mixed")), strict=True)]
    mean = sum(differences) / 3
    expected = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3) / 31
    assert versus["kl_saved_se"] == pytest.approx(expected)


def test_windows_are_never_of_the_test_split(root, tmp_path):
    """Nobody tunes on what arms of `qat run` are judged on."""
    from qat.cli.tree import Tree
    from qat.cli.validate import validate
    from qat.cli.verbs import VERBS

    _, *texts = arguments(root, "sensitivity", f"runs={tmp_path}", *SMALL)
    config, problems = validate(VERBS["sensitivity"], texts, Tree.of([]))
    assert problems == []
    bench = sensitivity.open_workbench(config, split="validation")
    assert bench.windows.equal(bench.tokens.windows("validation", 32, 3))
    assert not bench.windows.equal(bench.tokens.windows("test", 32, 3))


def test_what_is_said(done):
    assert "28/28" not in done.out
    assert "21/21 measured" in done.out
    for words in ("most sensitive first", "bits per quantized weight of 4", "qat run recipe="):
        assert words in done.out


def test_plots(done):
    pytest.importorskip("matplotlib")
    assert (done.path / "plots" / "sensitivity.png").is_file()
    assert (done.path / "plots" / "kl_vs_size.png").is_file()


def test_the_recipe_runs_as_it_is_and_its_export_is_verified(done, tmp_path, capsys):
    """Two widths in one file: packed, decoded by the foreign libraries, and served by the engine."""
    recipe = yaml.safe_load((done.path / "recipe.yaml").read_text())
    assert len(bits(recipe)) > 1
    more = [f"recipe={done.path}/recipe.yaml", "method=rtn", f"runs={tmp_path}"]
    given = [text for text in arguments(done.root, "ptq", *more) if not text.startswith("recipe.rules.")]
    assert main(given) == 0
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["export"]["verified"]
    assert summary["export"]["weights_equal"]
    assert summary["arms"]["rtn"]["bits_per_quantized_weight"] == pytest.approx(
        read(done)["allocation"]["bits_per_quantized_weight"]
    )
    config = json.loads((tmp_path / "latest/export/compressed_tensors/config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    packed = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    assert packed == {name: unit["chosen"] for name, unit in read(done)["units"].items()}


def test_a_run_that_was_cut_off_goes_on(done, tmp_path, monkeypatch):
    measured, real = [], sensitivity.measure

    def count(replay, unit, *rest):
        if len(measured) == 10:
            raise KeyboardInterrupt
        measured.append(unit.name)
        return real(replay, unit, *rest)

    monkeypatch.setattr(sensitivity, "measure", count)
    texts = arguments(done.root, "sensitivity", f"runs={tmp_path}", *SMALL)
    assert main(texts) == 130
    kept = json.loads((tmp_path / "latest" / "sensitivity.json").read_text())
    assert sum(len(unit["widths"]) for unit in kept["units"].values()) == 10
    measured.clear()
    monkeypatch.setattr(sensitivity, "measure", lambda *given: measured.append(given[1].name) or real(*given))
    assert main(texts) == 0
    assert len(measured) == 21 - 10
    assert json.loads((tmp_path / "latest" / "sensitivity.json").read_text()) == read(done)
    assert len(list((tmp_path / "sensitivity").iterdir())) == 1


def test_another_budget_takes_over_what_was_measured(done, monkeypatch):
    monkeypatch.setattr(sensitivity, "measure", None)
    (done.runs / "latest").unlink()
    (done.runs / "latest").symlink_to(done.path)
    status, path = go(done, "measured=latest", "metric=nll", "budget=3")
    assert status == 0
    state = json.loads((path / "sensitivity.json").read_text())
    assert state["allocation"]["bits_per_quantized_weight"] <= 3
    for name, unit in read(done)["units"].items():
        assert {b: cell["kl"] for b, cell in unit["widths"].items()} == {
            b: cell["kl"] for b, cell in state["units"][name]["widths"].items()
        }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("observer.points=5",), "it measured with another observer"),
        (("unit=kind",), "it measured with another unit"),
        (("bits=[2,4]",), "it measured with another bits"),
    ],
)
def test_other_measurements_are_not_taken_over(done, capsys, more, words):
    assert go(done, f"measured={done.path}", *more)[0] == 1
    assert words in capsys.readouterr().err


def test_only_a_run_of_this_verb_has_measurements(done, finished, capsys, monkeypatch):
    """And that is said before anything is loaded."""
    monkeypatch.setattr("qat.cli.sensitivity.open_workbench", None)
    before = sorted(done.runs.glob("*/*"))
    assert go(done, f"measured={finished.path}")[0] == 1
    assert "no finished run of qat sensitivity" in capsys.readouterr().err
    assert sorted(done.runs.glob("*/*")) == before


def test_units_of_one_kind(done):
    status, path = go(done, "unit=stage", "budget=3")
    assert status == 0
    state = json.loads((path / "sensitivity.json").read_text())
    assert [len(unit["modules"]) for unit in state["units"].values()] == [3, 1, 2, 1]
    assert state["allocation"]["divided"] == []


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (
            ("budget=2.4",),
            2,
            "budget: 2.4 bits per quantized weight are less than the smallest width takes; with bits=",
        ),
        (("metric=ppl",), 2, "metric: expected one of kl, nll"),
        (("calibration.samples=0",), 2, "calibration.samples: expected an integer of at least 1"),
        (("calibration.samples=999",), 1, "calibration.samples=999: the train split has 64 windows"),
        (("evaluation={windows: 99, seq_len: 32, batch_size: 2}",), 1, "split validation has 256 tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(done, tmp_path, capsys, more, status, words):
    assert main(arguments(done.root, "sensitivity", f"runs={tmp_path}/runs", *SMALL[:2], *more)) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_budget_is_checked_again_where_shapes_were_not_known_before(done, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qat.cli.files.budget", lambda *_: iter(()))
    assert main(arguments(done.root, "sensitivity", f"runs={tmp_path}", *SMALL[:2], "budget=2.4")) == 1
    assert "budget: 2.4 bits per quantized weight are less" in capsys.readouterr().err


def test_a_dry_run_measures_nothing(done, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "measure", None)
    assert go(done, "dry_run=true")[0] == 0
    assert "7 units x 3 widths on 64 tokens" in capsys.readouterr().out
