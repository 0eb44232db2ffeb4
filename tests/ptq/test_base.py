import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.base import listening, rows, targets
from qat.surgery.match import match
from qat.surgery.walk import Block

ATTENTION = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def block(model, index, layers="model.layers"):
    return Block(f"{layers}.{index}", model.get_submodule(f"{layers}.{index}"), [], [])


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
