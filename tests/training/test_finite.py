import pytest
import torch
from tiny import recipe, tiny
from torch import nn

from qat.nn.estimators import LSQ
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import prepare
from qat.training.finite import Doubt, first_broken, first_not_finite
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("-inf"), False)])
def test_a_doubt_is_about_the_number_as_it_was(device, value, finite):
    number = torch.tensor(value, device=device)
    doubt = Doubt("loss", number, 3)
    number.fill_(0.0 if not finite else float("nan"))
    assert doubt.finite() is finite


@pytest.mark.gpu
def test_asking_does_not_wait_for_what_was_launched_since():
    doubt = Doubt("loss", torch.ones((), device="cuda"), 0)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second or so
    assert doubt.finite()
    assert not torch.cuda.current_stream().query(), "the GPU is busy still"
    torch.cuda.synchronize()


def test_a_served_scale_that_is_not_finite_is_named_though_all_parameters_are():
    model = tiny()
    prepare(model, recipe(), MinMax(), LSQ())
    assert first_broken(model) is None
    quant = model.model.layers[1].mlp.up_proj.weight_fake_quant
    with torch.no_grad():
        quant.log_step.fill_(1e4)  # its exponential is beyond any dtype
    assert first_broken(model) == "the scale of model.layers.1.mlp.up_proj.weight_fake_quant"
