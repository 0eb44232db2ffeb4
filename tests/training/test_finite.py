import pytest
import torch
from tiny import tiny
from torch import nn

from qat.training.finite import first_not_finite
from qat.training.split import SplitModel

IDS = torch.tensor([[5, 9, 200, 7]])


class Poison(nn.Module):
    """Makes one number of a module's output what it should not be, in a forward of finite parameters."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        output[..., -1, 0] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"])
def test_the_first_module_in_order_of_execution_is_named(name, value):
    model = tiny()
    model.set_submodule(name, Poison(model.get_submodule(name), value))
    assert first_not_finite(SplitModel(model), IDS) == name


def test_nothing_is_named_where_all_is_finite_and_no_hook_stays():
    model = tiny()
    assert first_not_finite(SplitModel(model), IDS) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_what_comes_after_the_head_is_the_model_itself():
    model = tiny()
    split = SplitModel(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1e38 * 1e38)
    assert first_not_finite(split, IDS) == "lm_head"
