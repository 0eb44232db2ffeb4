from qat.cli.problem import Problem
from qat.cli.values import Opaque, build
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe

GRID = {"_target_": "qat.numerics.grid.IntGrid", "bits": 4}


def recipe(**scheme):
    weight = {
        "_target_": "qat.numerics.scheme.Scheme",
        "grid": GRID,
        "granularity": {"_target_": "qat.numerics.granularity.PerGroup", "group_size": 16},
    }
    rule = {"_target_": "qat.numerics.recipe.Rule", "match": ".*", "weight": weight | scheme}
    return {"_target_": "qat.numerics.recipe.Recipe", "rules": {"all": rule}}


def test_values_are_built():
    problems: list[Problem] = []
    built = build({"recipe": recipe(), "plain": {"a": [1, GRID]}, "seed": 3}, problems)
    assert problems == []
    assert isinstance(built["recipe"], Recipe)
    assert str(built["recipe"].rules["all"].weight) == "int4_g16"
    assert built["plain"] == {"a": [1, IntGrid(4)]}
    assert built["seed"] == 3


def test_a_refusal_names_the_key_and_stops_what_contains_it():
    problems: list[Problem] = []
    built = build({"recipe": recipe(grid=GRID | {"bits": 9})}, problems)
    assert [str(problem) for problem in problems] == [
        "recipe.rules.all.weight.grid: bits=9: an integer grid has 1 to 8 bits"
    ]
    assert isinstance(built["recipe"], Opaque)


def test_a_refusal_of_the_whole_names_the_whole():
    problems: list[Problem] = []
    build({"recipe": recipe(convention="odd")}, problems)
    assert [problem.where for problem in problems] == ["recipe.rules.all.weight"]


def test_what_is_known_to_be_wrong_is_not_tried():
    problems = [Problem("recipe.rules.all.weight.grid.bits", "known")]
    assert isinstance(build({"recipe": recipe(grid=GRID | {"bits": "x"})}, problems)["recipe"], Opaque)
    assert len(problems) == 1


def test_what_needs_torch_or_more_arguments_is_left():
    problems: list[Problem] = []
    nodes = {
        "torch": {"_target_": "torch.optim.AdamW"},
        "heavy": {"_target_": "qat.numerics.affine.rtn"},
        "partial": GRID | {"_partial_": True},
        "missing": GRID | {"bits": "???"},
    }
    assert all(isinstance(value, Opaque) for value in build(nodes, problems).values())
    assert problems == []
