"""start: a prepared model begins where a method ended, with exactly its codes."""

import torch
from torch import Tensor, nn

from qat.nn.fake_quantize import FakeQuantize
from qat.numerics.qtensor import QuantizedTensor
from qat.surgery.changes import Changes
from qat.surgery.prepare import fake_quants


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
        ValueError: The method changed a tensor that the model has not.
    """
    linears = fake_quants(student)
    if strays := sorted(set(changes.tensors) - set(linears)):
        raise ValueError(f"{strays[0]}: quantized by the method, but not by the recipe of the training")
    for name, tensor in changes.tensors.items():
        linears[name].weight.copy_(tensor.dequantize(torch.float32))
        _take(linears[name].weight_fake_quant, tensor)
    for name, value in changes.folded.items():
        _master(student, name).copy_(value)
    if changes.state:
        missing = student.load_state_dict(changes.state, strict=False)
        assert not missing.unexpected_keys, f"{missing.unexpected_keys[0]}: trained, but the prepared model has it not"
    for name, tensor in changes.tensors.items():
        quant = linears[name].weight_fake_quant
        same = torch.equal(quant.codes(linears[name].weight).cpu(), tensor.codes.cpu())
        assert same, f"{name}: training would not start from the codes that it was given"
        assert torch.equal(quant.qparams()[0].cpu(), tensor.scale.cpu()), f"{name}: nor from their scales"


def _take(quant: FakeQuantize, tensor: QuantizedTensor) -> None:
    quant.scale.copy_(tensor.scale)
    quant.log_step.zero_()
    if quant.zero_point is not None and tensor.zero_point is not None:
        quant.zero_point.copy_(tensor.zero_point)


def _master(model: nn.Module, name: str) -> Tensor:
    """The fp32 parameter behind a name of the full-precision model."""
    owner, _, key = name.rpartition(".")
    parameters = dict(model.named_parameters())
    for found in (f"{owner}.parametrizations.{key}.original", name):
        if found in parameters:
            return parameters[found]
    raise ValueError(f"{name}: changed by the method, but the prepared model has no such parameter")
