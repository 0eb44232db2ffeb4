"""The ablation of Block-AP: every cell composes, and what it measures is what blocks pass on."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))


@pytest.mark.whole
def test_every_cell_composes(tmp_path):
    import ablation
    from quality_plan import Cell

    given = Namespace(tokens=str(tmp_path), work=str(tmp_path), overrides=["arms.blockap.lr=1e-3"])
    for named in ("minmax-plain", "mse-relative"):
        for arm in ablation.TRAIN:
            method = ablation.composed(Cell(named, arm, 7), given)["arms"]["blockap"]
            assert method["train"][0] == ("weights" if arm == "W" else "scales")
            assert (method["relative"], method["lr"]) == (named == "mse-relative", 1e-3)
    with pytest.raises(ValueError, match=r"optim\.nonsense"):
        ablation.composed(Cell(named, arm, 7), Namespace(**(vars(given) | {"overrides": ["optim.nonsense=1"]})))


def test_errors_are_those_of_what_blocks_pass_on():
    from ablation_cells import errors

    full, other = tiny(layers=2), tiny(layers=2)
    ids = torch.arange(1, 25).reshape(3, 8)
    assert errors(full, other, ids, 2) == {"block_mse": 0.0, "block_relative": 0.0}
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    last = []
    for model in (full, other):
        handle = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
    error = (last[1] - last[0]).square().mean(-1)
    measured = errors(other, full, ids, 2)
    assert measured["block_mse"] == pytest.approx(float(error.mean()) / 2, rel=1e-5)
    assert measured["block_relative"] == pytest.approx(float((error / last[0].square().mean(-1)).mean()) / 2, rel=1e-5)


def test_means_and_spreads_are_over_seeds():
    import ablation

    rows = [
        {"start": "mse", "trained_for": "plain", "arm": arm, "initial": 1.0} | dict.fromkeys(ablation.COLUMNS, value)
        for arm, value in (("W", 3.0), ("s,z,W", 1.0), ("s,z,W", 2.0))
    ]
    first, second = ablation.summary(rows)
    assert (first["arm"], first["seeds"], first["ppl"]) == ("s,z,W", 2, 1.5)
    assert first["ppl_spread"] == pytest.approx(0.5**0.5)
    assert second["ppl_spread"] is None
    assert "1.50 ± 0.71" in ablation.table([first, second])
