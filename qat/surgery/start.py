"""start: a prepared model begins where a method ended, with exactly its codes."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.kernels.fake_quant import served_zero
from qat.nn.fake_quantize import FakeQuantize
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import is_input_scale
from qat.surgery.changes import Changes
from qat.surgery.prepare import Stored, fake_quants


@torch.no_grad()
def start_from(student: nn.Module, changes: Changes) -> None:
    """Gives a prepared model, in place, the codes, the scales and the changed tensors of a method.

    Where the method trained (`changes.state`), its fp32 masters and learned scales are taken over as they are.
    Elsewhere masters go to the centres of their cells, W := s (q - z): masters at the edges of cells would change
    millions of codes in the first steps.

    Args:
        student: A model after `surgery.prepare`, with the recipe that the method had.
        changes: What the method returned.

    Raises:
        ValueError: The method changed a tensor that the model has not, or groups in-features that are not consecutive.
    """
    linears = fake_quants(student)
    if strays := sorted(set(changes.tensors) - set(linears)):
        raise ValueError(f"{strays[0]}: quantized by the method, but not by the recipe of the training")
    if strays := [name for name, tensor in changes.tensors.items() if tensor.g_idx is not None]:
        raise ValueError(
            f"{strays[0]}: has a g_idx, but training's groups are of consecutive in-features; start from "
            f"act_order=group or static"
        )
    for name, tensor in changes.tensors.items():
        linears[name].weight.copy_(tensor.dequantize(torch.float32))
        linears[name].weight_fake_quant.take(tensor.scale, tensor.zero_point, tensor.global_scale)
    for name, value in changes.folded.items():
        if not is_input_scale(name):  # those are part of the state, or will be calibrated
            _take(student, name, value)
    _load(student, changes.state)
    for name, tensor in changes.tensors.items():
        quant = linears[name].weight_fake_quant
        same = torch.equal(quant.codes(linears[name].weight).cpu(), tensor.codes.cpu())
        assert same, f"{name}: training would not start from the codes that it was given"
        assert torch.equal(quant.qparams()[0].cpu(), tensor.scale.cpu()), f"{name}: nor from their scales"


def _load(student: nn.Module, state: dict[str, Tensor]) -> None:
    """Takes over what was trained; zero points that no longer train stay where they were trained to."""
    own = student.state_dict().keys()
    settled = {name for name in state if name.endswith(".zero_step") and name not in own}
    found = student.load_state_dict({k: v for k, v in state.items() if k not in settled}, strict=False)
    assert not found.unexpected_keys, f"{found.unexpected_keys[0]}: trained, but the prepared model has it not"
    for name in settled:
        quant = student.get_submodule(name.removesuffix(".zero_step"))
        assert isinstance(quant, FakeQuantize)
        assert isinstance(quant.scheme.grid, IntGrid)
        assert quant.zero_point is not None
        step = state[name].to(quant.zero_point.device)
        quant.zero_point.copy_(served_zero(quant.zero_point, step, quant.scheme.grid))


def _take(student: nn.Module, name: str, value: Tensor) -> None:
    """Gives a parameter of the full-precision model its new value, if it trains the master behind it.

    One that does not train (a rotated embedding) enters the forward rounded as well, by which `convert` knows it.
    """
    owner, _, key = name.rpartition(".")
    parameters, master = dict(student.named_parameters()), f"{owner}.parametrizations.{key}.original"
    if master not in parameters:
        if name not in parameters:
            raise ValueError(f"{name}: changed by the method, but the prepared model has no such parameter")
        parametrize.register_parametrization(student.get_submodule(owner), key, Stored(value.dtype), unsafe=True)
    student.get_parameter(master).copy_(value)
