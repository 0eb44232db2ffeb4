"""FakeQuantize: one tensor on its grid during training, with a gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.fake_quant import fake_quantize, served_scale
from qat.nn.estimators import Estimator
from qat.nn.observers.base import Observer
from qat.numerics.affine import group, quantize, scale_dtype
from qat.numerics.scheme import Scheme


class Phase(Enum):
    """What a FakeQuantize does with the tensors that pass through it."""

    OFF = "off"  # nothing: the tensor in the compute dtype
    OBSERVE = "observe"  # scales follow each tensor
    FROZEN = "frozen"  # scales stay as they were last observed
    LEARN = "learn"  # scales are trained, from where they were last observed


class FakeQuantize(nn.Module):
    """Rounds a tensor to its scheme's grid and dequantizes it, straight through for the gradient.

    Scales are kept as an observed part (`scale`, in its stored dtype) times `exp(log_step)`; `log_step` is the fp32
    parameter that LEARN trains. It starts at 0, so that the first step sees exactly the observed scale.

    Args:
        scheme: How the tensor is quantized.
        shape: Its shape; for dynamic schemes, which keep no scales, None.
        observer: Finds ranges.
        estimator: The gradient of rounding.
        storage: Storage dtype of the export.
        name: Of the module that owns it, for messages.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, ...] | None,
        observer: Observer,
        estimator: Estimator,
        storage: torch.dtype,
        name: str,
        device: torch.device | None = None,
    ):
        super().__init__()
        assert (shape is None) == scheme.dynamic, "static schemes keep scales of a known shape, dynamic ones none"
        self.scheme, self.observer, self.estimator, self.storage = scheme, observer, estimator, storage
        self.name, self.phase = name, Phase.OBSERVE
        self._kept: dict[torch.dtype, Tensor] | None = None
        if shape is not None:
            size = scheme.granularity.scale_shape(shape)
            stored = scale_dtype(scheme, storage)
            self.register_buffer("scale", torch.ones(size, dtype=stored, device=device))
            zero = None if scheme.symmetric else torch.zeros(size, dtype=torch.int8, device=device)
            self.register_buffer("zero_point", zero)
            step = torch.zeros(size, dtype=torch.float32, device=device)
            self.log_step = nn.Parameter(step, requires_grad=estimator.learns_scale)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Takes the scales from `x`; what was learned before is forgotten.

        Raises:
            ValueError: `x` is not finite, or its scales do not fit their dtype; names the module.
        """
        try:
            scale, zero_point = self.observer.qparams(x, self.scheme, self.storage)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        self.log_step.zero_()

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """The served scale, in its stored dtype, and the zero point."""
        return served_scale(self.scale, self.log_step.detach(), self.scale.dtype), self.zero_point

    def codes(self, x: Tensor) -> Tensor:
        """Codes (int8) that serving will have for `x`."""
        return quantize(x.detach(), *self.qparams(), self.scheme.grid)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` on its grid, in the compute dtype."""
        if self.phase is Phase.OFF:
            return x.to(dtype)
        if self._kept is not None and not self.scheme.dynamic:
            if dtype not in self._kept:
                self._kept[dtype] = self._quantize(x, dtype)
            return self._kept[dtype]
        return self._quantize(x, dtype)

    def _quantize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.scheme.dynamic:
            scale, zero_point = self.observer.qparams(x, self.scheme, torch.float32)
            return _FakeQuantize.apply(x, None, scale, zero_point, self.scheme, self.estimator, dtype)
        if self.phase is Phase.OBSERVE:
            self.observe(x)
        step = self.log_step if self.phase is Phase.LEARN and self.estimator.learns_scale else self.log_step.detach()
        return _FakeQuantize.apply(x, step, self.scale, self.zero_point, self.scheme, self.estimator, dtype)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.scheme}, {type(self.estimator).__name__}, {self.phase.name}"


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """While open, fake-quantized weights are computed once and kept: for repeated forwards without a gradient."""
    modules = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    for module in modules:
        module._kept = {}
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module._kept = None


class _FakeQuantize(torch.autograd.Function):
    """The opaque forward, and the estimator's backward. Saves only x and the served scales: v is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_step: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        estimator: Estimator,
        dtype: torch.dtype,
    ) -> Tensor:
        grid = scheme.grid
        result, served = fake_quantize(x, scale, log_step, zero_point, grid.qmin, grid.qmax, scale.dtype, dtype)
        ctx.save_for_backward(x, served, zero_point)
        ctx.scheme, ctx.estimator, ctx.learns = scheme, estimator, log_step is not None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, served, zero_point = ctx.saved_tensors
        grid, s = ctx.scheme.grid, served.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)
        v, z = group(x.to(s.dtype), served) / s, None
        if zero_point is not None:
            z = zero_point.to(s.dtype).unsqueeze(-1)
            v.add_(z)
        dx, ds = ctx.estimator.gradients(group(grads[0].to(s.dtype), served), v, grid.qmin, grid.qmax, z)
        dlog = None
        if ds is not None and ctx.learns and ctx.needs_input_grad[1]:
            dlog = (ds.sum(-1) * s.squeeze(-1)).to(torch.float32)  # d/dlog s = s d/ds
        return dx.reshape(x.shape).to(x.dtype), dlog, None, None, None, None, None
