"""The recipe beside an export composes and is the recipe; serve files lie there for engines that read it alone."""

import pytest
from hydra.utils import instantiate

from qat.cli.beside import RECIPE, as_config, launch, write_beside
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.formats.targets import Layer
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.report.launch import RAY, SGLANG, VLLM

TREE = Tree.of([])
INT4 = Scheme(IntGrid(4), PerGroup(64))
START = launch("org/Some Model", "w4", "bfloat16", 2048)


def composed(*texts):
    config, problems = validate(VERBS["run"], ["model=hf", "model.name=x", *texts], TREE, files=False)
    assert problems == []
    return config


@pytest.mark.parametrize("option", ["nvfp4", "w8a8_static", "seq2_g64", "w2a16_g64_asym", "mxfp4a16", "nf4_g64"])
def test_the_recipe_composes_and_is_the_recipe(option, tmp_path):
    suits = ("format=none", "estimator=clipped", "estimator@input_estimator=clipped")
    recipe = instantiate(composed(f"recipe={option}", *suits)["recipe"], _convert_="all")
    write_beside(tmp_path, recipe, "compressed_tensors", [], START)
    assert instantiate(composed(f"recipe={tmp_path / RECIPE}", *suits)["recipe"], _convert_="all") == recipe


def test_caches_and_patterns_survive(tmp_path):
    recipe = Recipe({"a": Rule(r"model\.layers\.(0|1)\..*_proj$", INT4), "b": Rule("lm_head", None)}, KINDS["int8"])
    write_beside(tmp_path, recipe, "compressed_tensors", [], START)
    assert instantiate(composed(f"recipe={tmp_path / RECIPE}")["recipe"], _convert_="all") == recipe
    assert instantiate(as_config(recipe), _convert_="all") == recipe


@pytest.mark.parametrize(
    ("name", "layer", "found"),
    [
        ("compressed_tensors", Layer("a.o_proj", (64, 128), INT4), {VLLM, RAY, SGLANG}),
        ("compressed_tensors", Layer("a.o_proj", (64, 64), INT4), {VLLM, RAY}),
        ("compressed_tensors", Layer("a.o_proj", (64, 128), Scheme(IntGrid(3), PerGroup(64))), set()),
        ("gguf", Layer("a.o_proj", (64, 128), INT4), set()),
    ],
)
def test_an_engine_that_would_not_load_it_is_not_started(tmp_path, name, layer, found):
    write_beside(tmp_path, Recipe({"a": Rule(".*", layer.weight)}), name, [layer], START)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == found | {RECIPE}


def test_a_name_is_one_that_fits_an_address():
    assert START.name == "Some-Model-w4"
    assert launch("smollm2", "a+b", "float16", 1).name == "smollm2-a-b"
