"""QATLinear: a linear layer that computes with what will be served."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.lora import LowRank


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype D in which a matmul runs: autocast's where it is on, else the weight's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class QATLinear(nn.Linear):
    """`y = x Q(W)^T + b` with fp32 master weights; parameter names are those of the `nn.Linear` that it replaces.

    With an adapter, `y = x Q(W + s B A)^T + b` (`lora.py`): whatever asks for the weight to be rounded asks `master`.
    """

    weight_fake_quant: FakeQuantize
    input_fake_quant: FakeQuantize | None
    adapter: LowRank | None

    @classmethod
    def from_float(cls, linear: nn.Linear, weight: FakeQuantize, input: FakeQuantize | None = None) -> "QATLinear":
        """Takes over a linear's parameters, without a copy."""
        self = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_fake_quant, self.input_fake_quant, self.adapter = weight, input, None
        return self.train(linear.training)

    def master(self) -> Tensor:
        """The weight that is rounded: W, or W + s B A; `[O, I]`, fp32."""
        return self.weight if self.adapter is None else self.adapter.merged(self.weight)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The weight on its grid, in the compute dtype."""
        quant = self.weight_fake_quant
        if self.adapter is None:
            return quant(self.weight, dtype)
        if (weight := quant.held(dtype)) is not None:
            return weight
        # Recomputed in backward: kept, the sums would take as much memory as the whole model in fp32.
        return checkpoint(lambda: quant(self.master(), dtype), use_reentrant=False, preserve_rng_state=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as `nn.Linear`: `[..., I] -> [..., O]`."""
        if self.weight_fake_quant.phase is Phase.OFF:
            return F.linear(input, self.master(), self.bias)
        dtype = compute_dtype(input, self.weight)
        weight = self.rounded(dtype)
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input, dtype)
        return F.linear(input.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))
