"""A target is asked before anything is loaded, and says the same of a model that is."""

import subprocess
import sys

import pytest

from qat.cli import files
from qat.cli.model_file import ModelFacts
from qat.cli.serving import check, kernel_lines, layers_of, refusals, reorders, served
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

SHAPES = {
    **{f"model.layers.{i}.self_attn.{name}": (rows, 576) for i in (0, 1) for name, rows in
       {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576}.items()},
    "lm_head": (1000, 576),
}  # fmt: skip


def recipe(bits=4):
    return Recipe({"a": Rule(".*_proj", Scheme(IntGrid(bits), PerGroup(64))), "h": Rule("lm_head", None)})


def said(*texts, verb="run"):
    return [str(problem) for problem in validate(VERBS[verb], list(texts), Tree.of([]))[1]]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(files, "facts", lambda path: ModelFacts(8192, SHAPES))
    return ("model=hf", "model.name=x", "model.path=somewhere", "adapter=none")


def test_each_rule_is_refused_once_and_by_its_first_layer(model):
    (text,) = said(*model, "recipe=w3a16_g64", "export.target=vllm")
    where = "recipe.rules.linears.weight.grid: model.layers.0.self_attn.q_proj [576, 576] as int3_g64_signed: "
    assert text.startswith(f"{where}export.target=vllm takes packed weights of 4 and 8 bits, not of 3")
    assert said(*model, "recipe=w3a16_g64") == []
    assert said(*model, "export.target=vllm") == []
    (text,) = said(*model, "export.target=sglang")
    assert text.startswith(
        "recipe.rules.linears.match: model.layers.0.self_attn.q_proj [576, 576] as int4_g64_signed: "
    )
    assert "not 576 x 960 (with what is fused)" in text


def test_groups_of_in_features_here_and_there_are_refused_where_they_are_not_read(model):
    dynamic = (*model, "method=gptq", "method.act_order=dynamic")
    assert said(*dynamic, verb="ptq") == []
    (text,) = said(*dynamic, "export.target=transformers", verb="ptq")
    assert text.startswith("recipe.rules.linears.weight.granularity: model.layers.0.self_attn.q_proj [576, 576] as int")
    assert "no g_idx since 0.19; use act_order=group or static, or format=gptq" in text
    assert said(*dynamic, "export.target=transformers", "format=gptq", "recipe=w4a16_g64", verb="ptq") == []
    (text,) = said(*dynamic, "export.target=vllm", verb="ptq")
    assert "export.target=vllm has Marlin for in-features in multiples of 128" in text
    assert "or use act_order=group" in text
    (text,) = said(*dynamic, "format=awq", verb="ptq")
    assert text.startswith("method.act_order: dynamic needs a g_idx, which format=awq cannot carry")
    assert said(*model, "arms.gptq.act_order=dynamic", "export.target=vllm") == []  # the trained arm is exported


def test_what_is_exported_reorders_and_neither_arms_nor_a_start_do():
    node = {"act_order": "dynamic"}
    for config in ({"method": node}, {"method": {"then": node}}, {"adapter": {"then": node}}):
        assert reorders(config)
    for config in (
        {"arms": {"a": node}},
        {"init": {"method": node}},
        {"adapter": {"then": {"act_order": "group"}}},
        {},
    ):
        assert not reorders(config)


def test_of_a_format_that_is_not_read_no_layer_is_asked():
    found = refusals("vllm", "gguf", layers_of(recipe(3), SHAPES), "bfloat16", None)
    assert [(module, part) for module, part, _ in found] == [("", "format.name")]


def test_formats_and_caches(model):
    (text,) = said(*model, "export.target=llamacpp")
    assert text == "format.name: export.target=llamacpp does not read format=compressed_tensors; use format=gguf"
    assert said(*model, "export.target=llamacpp", "format=gguf") == []
    (text,) = said(*model, "export.target=vllm", "kv=int8")
    assert text.startswith("recipe.kv: export.target=vllm reads a cache's scheme with one static scale")
    (text,) = said(*model, "export.target=vlm")
    assert text.endswith("did you mean vllm?")


def test_without_the_models_files_rules_are_asked():
    texts = ("model=hf", "model.name=x", "recipe=w3a16_g64", "export.target=vllm")
    (text,) = said(*texts)
    assert text.startswith(
        "recipe.rules.linears.weight.grid: .*_proj (rule linears) as int3_g64_signed: export.target=vllm "
    )
    assert said(*texts[:2], "export.target=sglang") == []  # nothing is known of sizes


def test_an_export_knows_its_format_already():
    (text,) = said("format=gguf", "export.target=vllm", verb="export")
    assert text == "format.name: export.target=vllm does not read format=gguf; use format=compressed_tensors"


def test_nothing_imports_torch():
    code = (
        "import sys; from qat.cli.main import main; "
        "texts = ['recipe=w3a16_g64', 'export.target=vllm', 'model=hf', 'model.name=x']; "
        "status = main(['configs', 'validate', 'run', *texts]); "
        "sys.exit(10 * ('torch' in sys.modules) + status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "export.target=vllm takes packed weights" in result.stdout + result.stderr
    assert result.returncode == 2


def test_a_loaded_model_is_held_to_the_same():
    layers = layers_of(recipe(3), SHAPES)
    config = {"export": {"target": "vllm", "dtype": "bfloat16"}, "format": {"name": "compressed_tensors"}}
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj \[576, 576\] as int3_g64: export"):
        check(config, layers, None)
    check({**config, "export": {"target": None, "dtype": "bfloat16"}}, layers, None)
    check({**config, "export": {"dtype": "bfloat16"}}, layers, None)  # the config of a run that knew no target
    check(config, layers_of(recipe(), SHAPES), None)
    with pytest.raises(ValueError, match=r"^format\.name: export\.target=vllm does not read format=gguf"):
        check({**config, "format": {"name": "gguf"}}, layers, None)


def test_kernels_are_said_of_every_kind_of_layer():
    head, *lines = kernel_lines("vllm", "compressed_tensors", layers_of(recipe(), SHAPES), "bfloat16")
    assert "not run here" in head
    assert [line.split() for line in lines] == [
        ["q_proj", "[576,", "576]", "x", "2", "Marlin"],
        ["k_proj", "[192,", "576]", "x", "2", "Marlin"],
        ["v_proj", "[192,", "576]", "x", "2", "Marlin"],
        ["o_proj", "[576,", "576]", "x", "2", "Marlin"],
    ]


def test_who_serves_and_why_not():
    found = served("compressed_tensors", layers_of(recipe(), SHAPES), "bfloat16", None)
    assert found["vllm"] is None
    assert "multiples of 128" in found["sglang"]
    found = served("gguf", layers_of(recipe(), SHAPES), "bfloat16", None)
    assert all(reason.startswith("format.name: ") for reason in found.values())
