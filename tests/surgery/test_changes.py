import pytest
import torch
from tiny import scheme
from tiny_grids import OTHERS

from qat.numerics.affine import divisor, rtn
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.surgery import changes as module
from qat.surgery.changes import Changes

NAME = "model.layers.0.mlp.up_proj"
SCHEMES = {"int": scheme(4), "asymmetric": scheme(4, symmetric=False)} | {
    name: OTHERS[name] for name in ("nvfp4", "mxfp4", "PerChannel()_nf4", "fp8_channel")
}


def changes(rule=SCHEMES["int"]):
    weight = torch.randn(8, 64)
    g = divisor((weight,), rule)
    tensor = QuantizedTensor(*rtn(weight, rule, torch.bfloat16, g), rule, (8, 64), g)
    state = {f"{NAME}.weight": weight, f"{NAME}.weight_fake_quant.log_step": torch.randn(8, 2)}
    return Changes({NAME: tensor}, {"norm.weight": torch.randn(4).bfloat16()}, [{"name": NAME, "loss": 1.5}], state)


@pytest.mark.parametrize("rule", SCHEMES.values(), ids=SCHEMES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, rule):
    one = changes(rule)
    one.save(tmp_path / "one.safetensors")
    again = Changes.load(tmp_path / "one.safetensors", Recipe({"all": Rule(".*", rule)}), "cpu")
    assert again.layers == one.layers
    for part in module.PARTS:
        before, after = getattr(one.tensors[NAME], part), getattr(again.tensors[NAME], part)
        assert (before is None) == (after is None)
        assert before is None or (torch.equal(before, after) and before.dtype == after.dtype)
    assert again.tensors[NAME].scheme == rule
    for part in ("folded", "state"):
        before, after = getattr(one, part), getattr(again, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(v, after[name]) and v.dtype == after[name].dtype for name, v in before.items())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "one.safetensors"
    changes().save(file)
    before = file.read_bytes()

    def full(parts, path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        changes().save(file)
    assert file.read_bytes() == before


def test_what_goes_to_a_device_goes_there_whole_and_the_state_stays():
    weight = torch.randn(8, 32)
    codes, scale, zero = rtn(weight, scheme(4, 16, symmetric=False), torch.bfloat16)
    tensor = QuantizedTensor(codes, scale, zero, scheme(4, 16, symmetric=False), (8, 32))
    changes = Changes({"a": tensor}, {"b": weight}, [{"name": "a"}], {"c": weight})
    moved = changes.to(torch.device("meta"))
    parts = (moved.tensors["a"].codes, moved.tensors["a"].scale, moved.tensors["a"].zero_point, moved.folded["b"])
    assert {part.device.type for part in parts} == {"meta"}
    assert (moved.layers, moved.state) == (changes.layers, changes.state)
    assert changes.tensors["a"].codes.device.type == "cpu"


def test_adding_takes_everything_over():
    both = Changes()
    both.add(changes())
    both.add(Changes(state={"a": torch.ones(1)}, layers=[{"name": "b"}]))
    assert set(both.state) == {"a", f"{NAME}.weight", f"{NAME}.weight_fake_quant.log_step"}
    assert [row["name"] for row in both.layers] == [NAME, "b"]
    assert set(both.tensors) == {NAME}
    assert set(both.folded) == {"norm.weight"}
