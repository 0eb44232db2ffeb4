import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, scheme, tiny

from qat.formats import awq, compressed_tensors, gptq
from qat.formats.base import (
    Checkpoint,
    Lazy,
    digest,
    file_bytes,
    load_plain,
    read_json,
    tensor_files,
    unquantized_state,
    write_directory,
)
from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe, Rule
from qat.ptq.rtn import rtn

BF16 = torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_round_trips_through_a_complete_directory(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny(tied=tied)
    state = unquantized_state(model, {}, {}, BF16)
    write_directory(tmp_path / "m", model, byte_tokenizer(), state, None, BF16)
    checkpoint = load_plain(tmp_path / "m")
    assert checkpoint.config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in checkpoint.plain) is not tied
    assert all(torch.equal(checkpoint.plain[n], v) for n, v in state.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert (tmp_path / "m" / "generation_config.json").exists()


def test_whoever_reads_the_directory_reads_its_files(tmp_path):
    write_directory(
        tmp_path / "out", tiny(), None, unquantized_state(tiny(), {}, {}, torch.bfloat16), None, torch.bfloat16
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == (tmp_path / "out").stat().st_mode & 0o666


def test_file_bytes_is_the_size_of_the_file(tmp_path):
    state = unquantized_state(tiny(), {}, {}, BF16) | {
        "w.codes": torch.zeros(7, 3, dtype=torch.int32),
        "w.shape": torch.zeros(2, dtype=torch.int64),
        "a": torch.zeros(3, dtype=torch.float32),
        "z": torch.zeros(5, dtype=torch.int8),
    }
    write_directory(tmp_path / "m", tiny(), None, state, None, BF16)
    assert file_bytes(state) == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_folded_tensors_win_and_strays_are_refused():
    model = tiny()
    norm = torch.ones(64, dtype=BF16)
    assert unquantized_state(model, {}, {"model.norm.weight": norm}, BF16)["model.norm.weight"] is not None
    assert torch.equal(unquantized_state(model, {}, {"model.norm.weight": norm}, BF16)["model.norm.weight"], norm)
    with pytest.raises(ValueError, match="nothing: a changed tensor that the model does not have"):
        unquantized_state(model, {}, {"nothing": norm}, BF16)


def test_what_the_storage_dtype_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"model\.norm\.weight: holds values beyond torch\.bfloat16"):
        unquantized_state(tiny(), {}, {"model.norm.weight": torch.full((64,), 1.001)}, BF16)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: not finite"):
        unquantized_state(tiny(), {}, {"model.norm.weight": torch.full((64,), float("nan"))}, BF16)


def test_a_directory_that_is_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than an earlier export"):
        write_directory(tmp_path, tiny(), None, {}, None, BF16)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds something other than an earlier export"):
        write_directory(tmp_path, tiny(), None, {}, None, BF16)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_the_earlier_export(tmp_path, monkeypatch):
    state = unquantized_state(tiny(), {}, {}, BF16)
    write_directory(tmp_path / "m", tiny(), None, state, {"quant_method": "x"}, BF16)
    monkeypatch.setattr(
        "qat.formats.base.save_torch_state_dict", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        write_directory(tmp_path / "m", tiny(), None, state, {"quant_method": "x"}, BF16)
    assert set(tensor_files(tmp_path / "m")) == set(state)


def test_digests_see_dtype_shape_and_bytes():
    x = torch.zeros(2, 3, dtype=BF16)
    others = [x.half(), x.view(3, 2), x + 1, torch.zeros(6, dtype=BF16)]
    assert len({digest(t) for t in [x, *others]}) == 5
    assert digest(x.t().contiguous().t()) == digest(x)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        tensor_files(tmp_path)
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not a safetensors file"):
        tensor_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensor_files(tmp_path)


def test_shards_must_agree_with_their_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for i in (1, 2):
        save_file({f"t{i}": torch.zeros(2)}, tmp_path / f"model-{i}.safetensors")
    index.write_text(json.dumps({"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}))
    assert set(tensor_files(tmp_path)) == {"t1", "t2"}
    index.write_text(json.dumps({"weight_map": {"t1": "model-1.safetensors", "t3": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match="disagree about t2"):
        tensor_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"t1": "../model-1.safetensors"}}))
    with pytest.raises(ValueError, match="the checkpoint is incomplete"):
        tensor_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"t1": "model-9.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-9\.safetensors: no such file"):
        tensor_files(tmp_path)


def test_a_tensor_is_in_one_shard_and_in_the_one_that_the_index_names(tmp_path):
    """Readers that go by the index would get another tensor than those that go by the shards."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}))
    save_file({"t1": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"t1": torch.ones(2), "t2": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="disagree about t1"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("value", ["DELETE", None, {}, [], ["a"], "a", {"model.norm.weight": 1}, {"a": None}], ids=repr)
def test_a_malformed_index_is_named(tmp_path, value):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({} if value == "DELETE" else {"weight_map": value}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: weight_map must be an object of strings"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("value", [None, {}, [], ["a"], "a", 1, False, {"model.norm.weight": None}], ids=repr)
def test_malformed_digests_do_not_switch_the_digests_off(tmp_path, value):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "verify.json").write_text(json.dumps({"sha256": value}))
    with pytest.raises(ValueError, match=r"verify\.json: sha256 must be an object of strings"):
        load_plain(tmp_path)


def test_json_that_is_none_is_named(tmp_path):
    for content in ("{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(tmp_path / "config.json")


def test_lazy_reads_what_is_asked_for():
    reads = []
    lazy = Lazy(["a", "b"], lambda name: reads.append(name) or name.upper())
    assert (len(lazy), list(lazy), "a" in lazy, "c" in lazy) == (2, ["a", "b"], True, False)
    assert reads == ["a"]  # `in` reads, as Mapping has it
    assert lazy["b"] == "B"
    with pytest.raises(KeyError):
        lazy["c"]


def test_the_model_of_another_tool_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than an earlier export"):
        write_directory(tmp_path, tiny(), None, {}, {"quant_method": "compressed-tensors"}, BF16)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_file_of_a_tensor_is_found_by_its_modules_or_parameters_name(tmp_path):
    files = {"a.qweight": tmp_path / "1", "a.b.qweight": tmp_path / "2", "ab.weight": tmp_path / "3"}
    checkpoint = Checkpoint(tmp_path, {}, Recipe(), {}, {}, files)
    assert [checkpoint.file(name).name for name in ("a", "a.b", "ab", "ab.weight")] == ["1", "2", "3", "3"]
    assert checkpoint.file("c") == tmp_path


def spoiled(value):
    """A part whose sixth number is another one, if it holds floats."""

    def change(part):
        if part.is_floating_point():
            part.view(-1)[5] = value
        return part

    return change


DAMAGES = [
    lambda part: None,
    lambda part: part[:-1].contiguous(),
    lambda part: part[:0].contiguous(),
    lambda part: part.T.contiguous() if part.dim() == 2 else part,
    lambda part: part.flatten(),
    lambda part: torch.cat([part, part]),
    lambda part: part.double() if part.is_floating_point() else part.long(),
    *(spoiled(value) for value in (float("nan"), float("inf"), 0.0)),  # a sign may be meant
]


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [awq, compressed_tensors, gptq], ids=lambda form: form.METHOD)
def test_a_damaged_part_is_refused_by_name_or_reads_as_the_same_weight(tmp_path, form, symmetric):
    """Without a certificate, as other tools write: what is read must follow from the parts alone."""
    module, path, model = "model.layers.0.self_attn.q_proj", tmp_path / "m", tiny(1)
    rules = Recipe({"rest": Rule(".*", None), "q": Rule(".*q_proj", scheme(symmetric=symmetric))})
    rules, tensors = form.expressed(rules, rtn(model, rules, [], observer=MinMax()).tensors)
    form.save(path, model, rules, tensors, {}, None)
    (path / "verify.json").unlink()
    whole, refusals = load_file(path / "model.safetensors"), []
    for name in [name for name in whole if name.startswith(f"{module}.")]:
        for how in DAMAGES:
            part = how(whole[name].clone())
            parts = {n: part if n == name else t for n, t in whole.items() if n != name or part is not None}
            save_file(parts, path / "model.safetensors")
            try:
                found = form.load(path).tensors[module].dequantize(torch.float32)
            except ValueError as error:
                refusals.append(str(error))
            else:
                assert torch.equal(found, tensors[module].dequantize(torch.float32)), (name, part)
    assert len(refusals) > 15
    assert all(module in refusal for refusal in refusals)
