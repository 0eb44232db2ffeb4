"""What is refused before torch is imported is what the format itself refuses, and the other way round."""

import pytest

from qat.cli.format_rules import BITS, MULTIPLES, carries, fits
from qat.cli.model_file import ModelFacts
from qat.engine.loader import FORMATS
from qat.formats import ct_args
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

GRIDS = [*map(IntGrid, range(2, 9)), FloatGrid("e4m3"), Codebook("ternary"), Codebook("nf4")]
SCHEMES = [
    Scheme(grid, granularity, symmetric)
    for grid in GRIDS
    for granularity in (PerGroup(16), PerGroup(32), PerGroup(64), PerChannel(), PerTensor())
    for symmetric in (True, False)
    if symmetric or isinstance(grid, IntGrid)
]


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("weight", SCHEMES, ids=str)
def test_the_format_says_the_same(name, weight):
    refused = bool(list(carries(name, Recipe({"a": Rule(".*", weight)}))))
    try:
        FORMATS[name].check_scheme("a", weight)
    except ValueError:
        assert refused
    else:
        assert not refused


@pytest.mark.parametrize("name", BITS)
def test_inputs_and_caches(name):
    good = Scheme(IntGrid(4), PerGroup(32))
    dynamic = Scheme(IntGrid(8), PerToken(), dynamic=True)
    found = list(carries(name, Recipe({"a": Rule(".*", good, dynamic), "b": Rule("b", None)}, KINDS["int8"])))
    assert [problem.where for problem in found] == ["recipe.kv", "recipe.rules.a.input"]
    said = f"format={name} carries weights only, not the input scheme int8_token_dynamic"
    assert found[1].text == f"{said}; use format=compressed_tensors or input=null"


@pytest.mark.parametrize("name", BITS)
def test_the_format_that_is_named_instead_carries_it(name):
    dynamic = Scheme(IntGrid(8), PerToken(), dynamic=True)
    for weight in SCHEMES:
        for input in (None, dynamic):
            for problem in carries(name, Recipe({"a": Rule(".*", weight, input)})):
                if "use format=compressed_tensors" in problem.text:
                    assert not list(ct_args.refused(weight, input)), problem.text
                elif "use format=none" in problem.text:
                    assert list(ct_args.refused(weight, input)), problem.text


def test_one_group_size_for_awq_alone():
    rules = {"a": Rule(".*", Scheme(IntGrid(4), PerGroup(32))), "b": Rule("b", Scheme(IntGrid(4), PerChannel()))}
    (found,) = carries("awq", Recipe(rules))
    assert "one group size for the whole file" in found.text
    assert list(carries("gptq", Recipe(rules))) == []


def test_compressed_tensors_and_none_have_rules_of_their_own():
    rules = Recipe({"a": Rule(".*", Scheme(FloatGrid("e4m3"), PerChannel()))})
    assert list(carries("compressed_tensors", rules)) == list(carries("none", rules)) == []


@pytest.mark.parametrize("name", MULTIPLES)
def test_sizes_that_do_not_fill_words_once_for_each_rule(name):
    rules = Recipe({"a": Rule(".*", Scheme(IntGrid(4), PerChannel())), "c": Rule("c", None)})
    rows, columns = MULTIPLES[name]
    whole, odd = (rows * 3, columns * 3), (rows * 3 + 1, columns * 3)
    facts = ModelFacts(None, {"good": whole, "c": odd, "one": odd, "two": odd})
    assert list(fits(name, rules, ModelFacts(None, {"good": whole}))) == []
    found = list(fits(name, rules, facts))
    assert [problem.where for problem in found] == (["recipe.rules.a.match"] if rows > 1 else [])
    assert all(f"one is {list(odd)}; format={name} packs multiples of" in problem.text for problem in found)
