import pytest
import torch
from tiny import recipe, scheme

from qat.numerics.affine import rtn
from qat.numerics.qtensor import QuantizedTensor
from qat.surgery import changes as module
from qat.surgery.changes import Changes

NAME = "model.layers.0.mlp.up_proj"


def changes(symmetric=False, **more):
    s = scheme(4, 32, symmetric)
    codes, scale, zero = rtn(torch.randn(8, 64), s, torch.bfloat16)
    tensor = QuantizedTensor(codes, scale, zero, s, (8, 64), **more)
    state = {f"{NAME}.weight": torch.randn(8, 64), f"{NAME}.weight_fake_quant.log_step": torch.randn(8, 2)}
    return Changes({NAME: tensor}, {"norm.weight": torch.randn(4).bfloat16()}, [{"name": NAME, "loss": 1.5}], state)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("more", [{}, {"global_scale": torch.tensor([2.5])}])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, symmetric, more):
    one = changes(symmetric, **more)
    one.save(tmp_path / "one.safetensors")
    again = Changes.load(tmp_path / "one.safetensors", recipe(4, 32, symmetric), "cpu")
    assert again.layers == one.layers
    for part in module.PARTS:
        before, after = getattr(one.tensors[NAME], part), getattr(again.tensors[NAME], part)
        assert (before is None) == (after is None)
        assert before is None or (torch.equal(before, after) and before.dtype == after.dtype)
    assert again.tensors[NAME].scheme == one.tensors[NAME].scheme
    for part in ("folded", "state"):
        before, after = getattr(one, part), getattr(again, part)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items()
        )


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


def test_adding_takes_everything_over():
    both = Changes()
    both.add(changes())
    both.add(Changes(state={"a": torch.ones(1)}, layers=[{"name": "b"}]))
    assert set(both.state) == {"a", f"{NAME}.weight", f"{NAME}.weight_fake_quant.log_step"}
    assert [row["name"] for row in both.layers] == [NAME, "b"]
    assert set(both.tensors) == {NAME}
    assert set(both.folded) == {"norm.weight"}
