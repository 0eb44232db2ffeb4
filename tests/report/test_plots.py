import importlib.util

import pytest

from qat.report import plots
from qat.report.plots import draw

PNG = b"\x89PNG\r\n\x1a\n"


def test_two_plots_are_written(write, tmp_path):
    pytest.importorskip("matplotlib")
    files = draw([write("a"), write("b")], tmp_path / "deep" / "plots")
    assert [file.name for file in files] == ["ppl_vs_size.png", "kl_vs_size.png"]
    for file in files:
        assert file.parent == tmp_path / "deep" / "plots"
        assert file.read_bytes().startswith(PNG)
        assert file.stat().st_size > 5000


def test_every_arm_is_a_point_and_full_precision_has_no_kl(write, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    points: list[tuple[str, tuple[float, float]]] = []
    annotate = Axes.annotate

    def record(self, text, xy, *args, **kwargs):
        points.append((text, xy))
        return annotate(self, text, xy, *args, **kwargs)

    monkeypatch.setattr(Axes, "annotate", record)
    draw([write("a")], tmp_path / "plots")
    assert points == [
        *(("fp", (2.0, 10.0)), ("gptq", (0.7, 12.0)), ("qat", (0.7, 11.0))),
        *(("gptq", (0.7, 0.2)), ("qat", (0.7, 0.05))),
    ]


def test_without_matplotlib_there_is_no_plot_and_no_directory(write, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        plots.importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    assert draw([write("a")], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
