import pytest
import torch
from tiny import embedded, recipe, scheme, tiny

from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.awq import awq
from qat.ptq.base import listening, onwards, rows, targets
from qat.ptq.gptq import gptq
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply
from qat.surgery.match import match
from qat.surgery.walk import Block

ATTENTION = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def block(model, index, layers="model.layers"):
    module = model.get_submodule(f"{layers}.{index}")
    return Block(f"{layers}.{index}", module, [], [], module)


def test_targets_are_the_quantized_linears_of_one_block_by_their_name_in_it():
    model = tiny(layers=2)
    assert targets(block(model, 1), match(model, recipe())) == dict.fromkeys(ATTENTION + MLP, scheme())


def test_targets_leave_out_what_the_recipe_leaves_alone():
    model = tiny(layers=2)
    rules = Recipe(recipe().rules | {"first": Rule(r"model\.layers\.0\.mlp.*", None)})
    plan = match(model, rules)
    assert list(targets(block(model, 0), plan)) == ATTENTION
    assert list(targets(block(model, 1), plan)) == ATTENTION + MLP


def test_a_block_is_not_taken_for_another_whose_number_starts_alike():
    model = tiny(layers=11)
    plan = match(model, recipe())
    assert list(targets(block(model, 1), plan)) == ATTENTION + MLP
    assert all(model.get_submodule(f"model.layers.1.{name}") for name in targets(block(model, 1), plan))


def test_an_input_scheme_does_not_touch_the_weights():
    model = tiny(layers=1)
    inputs = Scheme(IntGrid(8), PerToken(), dynamic=True)
    plan = match(model, Recipe({"linears": Rule(".*up_proj", scheme(), inputs)}))
    assert targets(block(model, 0), plan) == {"mlp.up_proj": scheme()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_lies_outside_of_the_blocks_is_rounded_on_the_methods_observer_and_reported(method, tied):
    """It was left alone without a word: a recipe means all of its modules, whatever a method can do for them."""
    model = tiny(layers=1, tied=tied)
    rules = Recipe(embedded().rules | ({} if tied else {"head": Rule("lm_head", scheme(3))}))
    knobs = {"grid": 2} if method == "awq" else {}
    call = {"gptq": gptq, "awq": awq}[method]
    changes = call(model, rules, [torch.randint(0, 256, (2, 24))], observer=MSE(6), **knobs)
    plain = rtn(model, rules, [], observer=MSE(6))
    assert changes.tensors.keys() == plain.tensors.keys()
    names = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    for name in names:
        assert torch.equal(changes.tensors[name].codes, plain.tensors[name].codes)
        assert torch.equal(changes.tensors[name].scale, plain.tensors[name].scale)
        (row,) = [row for row in changes.layers if row["name"] == name]
        assert "outside of the decoder blocks" in row["fallback"]
    assert [row["name"] for row in changes.layers if row.get("fallback")] == names
    assert not any(row.get("fallback") for row in plain.layers)  # rounding is what that method does


def test_gptq_sees_the_quantized_embedding_from_the_first_block_on():
    model, batches = tiny(layers=1), [torch.randint(0, 256, (2, 24))]
    rules = embedded(scheme(2))
    table = rtn(model, rules, [], observer=MinMax()).tensors["model.embed_tokens"]
    other = apply(model, {"model.embed_tokens": table}, {})
    expected = gptq(other, recipe(), batches, observer=MinMax()).tensors
    found = gptq(model, rules, batches, observer=MinMax()).tensors
    assert all(torch.equal(found[name].codes, tensor.codes) for name, tensor in expected.items())


def test_listening_sees_every_call_while_it_is_open_and_none_after():
    linear, seen = torch.nn.Linear(3, 2), []
    with listening(linear, lambda args, kwargs: seen.append((args, kwargs))):
        linear(torch.ones(1, 3))
        linear(input=torch.zeros(1, 3))
    linear(torch.ones(1, 3))
    assert len(seen) == 2
    assert torch.equal(seen[0][0][0], torch.ones(1, 3))
    assert torch.equal(seen[1][1]["input"], torch.zeros(1, 3))


def test_listening_ends_with_an_error_too():
    linear, seen = torch.nn.Linear(3, 2), []
    with pytest.raises(KeyError), listening(linear, lambda args, kwargs: seen.append(args)):
        raise KeyError
    linear(torch.ones(1, 3))
    assert seen == []


def test_rows_are_tokens_in_order():
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(rows(x), torch.stack([x[0, 0], x[0, 1], x[0, 2], x[1, 0], x[1, 1], x[1, 2]]))
    assert torch.equal(rows(x[0]), x[0])


def test_what_somebody_moved_is_rounded_as_the_recipe_says_and_the_rest_is_folded():
    model = tiny()
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    moved = {up: torch.randn(128, 64), norm: torch.randn(64)}
    other = apply(model, {}, {up: moved[up], norm: moved[norm].bfloat16()})
    for then in (None, lambda *args, **knobs: rtn(*args, observer=MinMax(), **knobs)):
        found = onwards(model, recipe(), [], moved, then, MinMax(), torch.bfloat16, None, None)
        expected = rtn(other, recipe(), [], observer=MinMax()).tensors
        assert found.folded.keys() == {norm}
        assert torch.equal(found.folded[norm], moved[norm].bfloat16())
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[name].codes, tensor.codes) for name, tensor in expected.items())


def test_a_method_that_goes_on_keeps_its_blocks_in_a_folder_of_its_own(tmp_path):
    model, batches = tiny(), [torch.randint(0, 256, (2, 24))]

    def then(*args, **knobs):
        return gptq(*args, observer=MinMax(), **knobs)

    onwards(model, recipe(), batches, {}, then, MinMax(), torch.bfloat16, tmp_path, None)
    assert [file.parent.name for file in tmp_path.rglob("block-*")] == ["then", "then"]
