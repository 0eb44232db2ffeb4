import copy
import io

import pytest
from rich.console import Console

from qat.report.sensitivity import allocation_lines, draw, ranked, recipes_table, sensitivity_table

PNG = b"\x89PNG\r\n\x1a\n"


def cell(loss, bits):
    return {"bits": bits, "kl": loss, "kl_se": loss / 10, "nll": -loss, "nll_se": 0.0, "loss": loss}


def unit(two, four, chosen):
    return {
        "modules": ["a"],
        "weights": 10,
        "widths": {"2": cell(two, 22), "4": cell(four, 42)},
        "chosen": chosen,
    }


STATE = {
    "units": {"calm": unit(0.01, 0.001, 2), "touchy": unit(0.5, 0.02, 4), "flat": unit(0.0, 0.0, 2)},
    "allocation": {
        "budget": 3,
        "metric": "kl",
        "bits_per_quantized_weight": 2.9,
        "loss": 0.03,
        "bound": 0.029,
        "smoothed": [],
        "divided": [],
    },
    "versus": {"arm": "w2", "bits_per_quantized_weight": 2.25, "windows": 4, "kl_saved": 0.2, "kl_saved_se": 0.01},
}


def changed(part, **values):
    state = copy.deepcopy(STATE)
    state[part] |= values
    return state


def shown(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_most_sensitive_unit_comes_first():
    assert ranked(STATE) == ["touchy", "calm", "flat"]
    text = shown(sensitivity_table(STATE, "kl"))
    assert text.index("touchy") < text.index("calm")
    assert "5.0e-01 ± 5e-02" in text
    assert "-5.0e-01" in shown(sensitivity_table(STATE, "nll"))


def test_a_long_table_is_cut_and_says_so():
    units = {f"unit{i}": unit(i, i / 2, 2) for i in range(33)}
    text = shown(sensitivity_table({"units": units}, "kl"))
    assert "13 more in sensitivity.json" in text
    assert "unit32" in text
    assert "unit12 " not in text


def test_recipes_stand_by_their_size():
    arm = {"bytes": 1e6, "ppl": 2.0, "nll": 0.7, "kl": 0.1, "top1_agree": 0.5}
    arms = {"fp": arm | {"bits_per_quantized_weight": 16}, "mixed": arm | {"bits_per_quantized_weight": 3.25}}
    text = shown(recipes_table(arms, "title"))
    assert text.index("mixed") < text.index("fp")
    assert "3.2500" in text


def test_what_was_chosen_is_said():
    lines = allocation_lines(STATE, 0.04)
    assert lines[0] == "modules: 2 at 2 bits, 1 at 4 bits; 2.9000 bits per quantized weight of 3"
    assert "0.03, the least there is (the Lagrangian bound is 1.0e-03 below); KL of the whole recipe 0.04" in lines[1]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("versus", "words"),
    [
        ({}, "the mixture helps: its KL is 0.2000 ± 0.0100 nats below w2's, the largest single width that fits (2.25"),
        ({"kl_saved_se": 0.1}, "the mixture does NOT help beyond noise: its KL is 0.2000 ± 0.1000 nats below w2's"),
        ({"kl_saved": -0.2}, "the mixture does NOT help beyond noise: its KL is 0.2000 ± 0.0100 nats above w2's"),
        ({"windows": 1}, "one window has no standard error; there the KL is 0.2000 nats below w2's"),
    ],
)
def test_whether_it_helps(versus, words):
    assert allocation_lines(changed("versus", **versus), 0.04)[-1].startswith(words)


def test_one_width_for_all_is_no_mixture():
    state = changed("units", touchy=unit(0.5, 0.02, 2))
    assert allocation_lines(state, 0.04)[-1].startswith("no mixture within the budget")


def test_noise_and_divided_stages_are_said():
    lines = allocation_lines(changed("allocation", smoothed=["calm"], divided=["q+k"]), 0.04)
    assert lines[2].startswith("1 of 3 units lost less at a smaller width")
    assert lines[3].startswith("NOTE: 1 groups of linears that share their input have several widths, first q+k")


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    (file,) = draw(STATE, tmp_path / "plots")
    assert file.name == "sensitivity.png"
    assert file.read_bytes().startswith(PNG)


def test_every_unit_is_a_point_at_every_width_and_the_chosen_ones_are_ringed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def record(self, x, y, *args, **kwargs):
        drawn[kwargs["label"]] = y
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    draw(STATE, tmp_path)
    assert drawn == {"2 bits": [0.01, 0.5, 0.0], "4 bits": [0.001, 0.02, 0.0], "chosen": [0.01, 0.02, 0.0]}


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    from qat.report import sensitivity

    monkeypatch.setattr(sensitivity.importlib.util, "find_spec", lambda name, *a: None)
    assert draw(STATE, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
