"""Our solver beside another: what explains a code that differs, and what does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.numerics.affine import quantize
from qat.numerics.grid import IntGrid

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def opened(order="none", bits=4, seed=0):
    import solvers

    problem = solvers.random_problem(12, 128, seed)
    case = solvers.Case("p", bits, 64, order)
    return problem, case, solvers.ours(problem, case), solvers.exact_factor(problem, case)


@pytest.mark.parametrize("order", ["none", "static"])
def test_replay_is_gptq_column_by_column(order):
    import solvers

    problem, case, (codes, scale), factor = opened(order)
    rest, steps = problem[0].double(), scale.double().repeat_interleave(64, 1)
    places = range(128) if order == "none" else problem[1].diagonal().argsort(descending=True).tolist()
    expected = torch.empty_like(rest)
    for j, place in enumerate(places):
        expected[:, place] = rest[:, place] / steps[:, place]
        error = (rest[:, place] - codes[:, place] * steps[:, place]) / factor[j, j]
        for k in range(j + 1, 128):
            rest[:, places[k]] -= error * factor[j, k]
    found = solvers.replay(problem, case, (codes, scale), factor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert float(solvers.off(found, codes, IntGrid(4)).max()) <= solvers.ROUNDING


def test_off_is_the_distance_from_a_cell_and_outermost_levels_take_all_beyond_them():
    import solvers

    before = torch.tensor([0.25, 0.75, -0.75, 99.0, -99.0, 6.25])
    codes = torch.tensor([0, 0, 0, 7, -8, 7], dtype=torch.int8)
    assert solvers.off(before, codes, IntGrid(4)).tolist() == [0, 0.25, 0.25, 0, 0, 0.25]


def test_equal_codes_are_explained_and_round_to_nearest_is_not():
    import solvers

    problem, case, mine, factor = opened("static", 3)
    row = solvers.compared(problem, case, mine, mine, factor)
    assert row["equal"] == row["codes"] == 12 * 128
    assert solvers.explained(row)
    assert row["ours_off"] == row["theirs_off"] == row["theirs_off_exact_factor"] <= solvers.ROUNDING
    nearest = quantize(problem[0], mine[1], None, IntGrid(3))
    row = solvers.compared(problem, case, mine, (nearest, mine[1]), factor)
    assert row["unexplained"] > 100
    assert not solvers.explained(row)


def test_one_code_that_is_off_is_not_explained():
    import solvers

    problem, case, mine, factor = opened()
    other = mine[0].clone()
    other[5, 40] += 1 if other[5, 40] < 0 else -1
    row = solvers.compared(problem, case, mine, (other, mine[1]), factor)
    assert (row["differing"], row["first_of_a_row"], row["near_a_tie"]) == (1, 1, 0)
    assert row["unexplained"] > 0
    assert not solvers.explained(row)


def test_another_damping_or_another_scale_is_not_explained():
    import solvers

    problem, case, mine, factor = opened()
    damped = solvers.ours(problem, replace(case, damping=0.011))
    assert not solvers.explained(solvers.compared(problem, case, mine, damped, factor))
    moved = mine[0], torch.nextafter(mine[1], torch.tensor(9.0))
    row = solvers.compared(problem, case, mine, moved, factor)
    assert not row["scales_equal"]
    assert not solvers.explained(row)


def test_a_tie_that_falls_to_the_other_side_is_explained_with_all_that_follows():
    """Two weights that differ by less than fp32 rounding does, on either side of a tie."""
    import solvers

    (weight, hessian), case, mine, factor = opened()
    weight = weight.clone()
    weight[3, 0] = 2.5 * mine[1][3, 0]
    below, above = weight.clone(), weight.clone()
    below[3, 0] -= 1e-6
    above[3, 0] += 1e-6
    one, other = (solvers.ours((w, hessian), case) for w in (below, above))
    row = solvers.compared((weight, hessian), case, one, other, factor)
    assert row["differing"] > 1
    assert (row["first_of_a_row"], row["near_a_tie"], row["unexplained"]) == (1, 1, 0)
    assert solvers.explained(row)
    (total,) = solvers.summary([row, row])
    assert (total["cases"], total["codes"], total["explained"]) == (2, 2 * row["codes"], True)
    assert total["ours_off"] == row["ours_off"]
    assert f"| `p` | 3,072 | {2 * row['differing']} | 2 | 2 | 0 |" in solvers.table([total])
    (total,) = solvers.summary([row, row | {"near_a_tie": 0}])
    assert not total["explained"]


def test_what_the_other_environment_is_asked_and_says(tmp_path):
    import solvers

    problems = {"p": solvers.random_problem(2, 128, 0)}
    asked = solvers.cases(problems)
    assert len({case.name for case in asked}) == len(asked) == 8
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho the reason >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 3:\nthe reason"):
        solvers.theirs(problems, asked, python, tmp_path / "work")
    with solvers.safe_open(tmp_path / "work" / "problems.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["p.hessian", "p.weight"]
        named = [case["name"] for case in json.loads(file.metadata()["cases"])]
    assert named == [case.name for case in asked]
