"""FakeQuantize: one tensor on its grid during training, with a gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.fake_quant import fake_quantize, served_scale, served_zero, taken
from qat.nn.backward import fake_quantize_backward
from qat.nn.dynamic import fake_quantize_dynamic
from qat.nn.estimators import Estimator
from qat.nn.interned import intern
from qat.nn.observers.base import Observer, across_ranks
from qat.numerics.affine import divisor, qparams, quantize, scale_dtype
from qat.numerics.grid import Grid, IntGrid
from qat.numerics.scheme import Scheme


class Phase(Enum):
    """What a FakeQuantize does with the tensors that pass through it."""

    OFF = "off"  # nothing: the tensor in the compute dtype
    OBSERVE = "observe"  # scales follow: of an input with each tensor, of a weight when `observe` is called
    FROZEN = "frozen"  # scales stay as they were last observed
    LEARN = "learn"  # scales are trained, from where they were last observed


class FakeQuantize(nn.Module):
    """Rounds a tensor to its scheme's grid and dequantizes it, straight through for the gradient.

    Scales are kept as an observed part (`scale`, in its stored dtype) times `exp(log_step)`, zero points as an observed
    part plus `zero_step`. The steps are fp32 parameters, which LEARN trains if the estimator learns them; they start
    at 0, so that the first step sees exactly what was observed.

    Args:
        scheme: How the tensor is quantized.
        shape: Its shape, as far as the scheme's scales depend on it; for dynamic schemes, which keep none, None.
        observer: Finds ranges.
        estimator: The gradient of rounding.
        storage: Storage dtype of the export.
        name: Of the module that owns it, for messages.
        running: Whether tensors differ from call to call (activations): ranges are then gathered over all of them, in
            training mode only, never in a checkpoint's recomputation, and reduced over ranks.
    """

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, ...] | None,
        observer: Observer,
        estimator: Estimator,
        storage: torch.dtype,
        name: str,
        device: torch.device | None = None,
        running: bool = False,
    ):
        super().__init__()
        assert (shape is None) == scheme.dynamic, "static schemes keep scales of a known shape, dynamic ones none"
        self.scheme, self.observer, self.estimator, self.storage = scheme, observer, estimator, storage
        self._names = intern(scheme), intern(observer)
        self.name, self.phase, self.running = name, Phase.OBSERVE, running
        self._strength: Tensor | None = None
        self._kept: dict[torch.dtype, Tensor] | None = None
        self.register_buffer("global_scale", torch.ones(1, device=device) if scheme.two_level else None)
        self.zero_step: nn.Parameter | None = None
        size = (1,) if shape is None else scheme.granularity.scale_shape(shape)
        if shape is not None:
            self.register_buffer("scale", torch.ones(size, dtype=scale_dtype(scheme, storage), device=device))
            zero = None if scheme.symmetric else torch.zeros(size, dtype=torch.int8, device=device)
            self.register_buffer("zero_point", zero)
            self.log_step = nn.Parameter(torch.zeros(size, device=device), requires_grad=estimator.learns_scale)
            if estimator.learns_zero and not scheme.symmetric:
                self.zero_step = nn.Parameter(torch.zeros(size, device=device))
        if running and (shape is not None or scheme.two_level):
            self.register_buffer("low", torch.zeros(size, device=device))
            self.register_buffer("high", torch.zeros(size, device=device))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # on the CPU: asked for without a wait

    @torch.no_grad()
    def observe(self, x: Tensor, together: tuple[Tensor, ...] = ()) -> None:
        """Takes scales and zero points from `x`; what was learned before is forgotten.

        Args:
            x: The tensor.
            together: Tensors that share x's global scale, x among them; empty: x alone.

        Raises:
            ValueError: `x` is not finite, or its scales do not fit their dtype; names the module.
        """
        try:
            if self.running:
                self._observe_range(x)
                return
            g = divisor(together or (x,), self.scheme)
            self.take(*self.observer.qparams(x, self.scheme, self.storage, g), g)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _observe_range(self, x: Tensor) -> None:
        if self.scheme.dynamic:
            whole = x.detach().float().aminmax()
            new = (whole.min.reshape(1), whole.max.reshape(1))
        else:
            new = self.observer.observe(x, self.scheme, self.storage)
        new = across_ranks(*new, self.observer.averages)
        seen = int(self.seen)
        low, high = self.observer.merge((self.low, self.high), new, seen) if seen else new
        self.low.copy_(low)
        self.high.copy_(high)
        self.seen += 1
        if self.scheme.dynamic:
            g = divisor((low, high), self.scheme)
            assert self.global_scale is not None
            assert g is not None
            self.global_scale.copy_(g)
        else:
            self.take(*qparams(low, high, self.scheme, self.storage), None)

    @torch.no_grad()
    def take(self, scale: Tensor, zero_point: Tensor | None, g: Tensor | None) -> None:
        """Serves these from here on, as if they had been observed; what was learned before is forgotten."""
        self.scale.copy_(scale)
        self.log_step.zero_()
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        if self.zero_step is not None:
            self.zero_step.zero_()
        if self.global_scale is not None and g is not None:
            self.global_scale.copy_(g)

    @property
    def estimator(self) -> Estimator:
        """The gradient of rounding."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Estimator) -> None:
        self._estimator, self._rule = value, intern(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.estimator = self._estimator  # another process has not interned them
        self._names = intern(self.scheme), intern(self.observer)

    @property
    def strength(self) -> float:
        """How far the result goes from the tensor to its grid: 1 is all the way."""
        return 1.0 if self._strength is None else float(self._strength)

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = None if value == 1.0 else torch.tensor(value, dtype=torch.float64)

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """The served scale, in its stored dtype, and the served zero point."""
        zero = self.zero_point
        if zero is not None:
            assert isinstance(self.scheme.grid, IntGrid)
            zero = served_zero(zero, None if self.zero_step is None else self.zero_step.detach(), self.scheme.grid)
        return served_scale(self.scale, self.log_step.detach()), zero

    def codes(self, x: Tensor) -> Tensor:
        """Codes that serving will have for `x`."""
        return quantize(x.detach(), *self.qparams(), self.scheme.grid, self.global_scale)

    def forward(self, x: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """`x` on its grid, in the compute dtype; `rows` `[n]` of a matrix: these alone, `[n, I]`."""
        if self.phase is Phase.OFF:
            return x.to(dtype) if rows is None else x.index_select(0, rows).to(dtype)
        if self._kept is not None and not self.running:
            if dtype not in self._kept:
                self._kept[dtype] = self._quantize(x, dtype)
            return self._kept[dtype] if rows is None else self._kept[dtype].index_select(0, rows)
        return self._quantize(x, dtype, rows)

    def held(self, dtype: torch.dtype) -> Tensor | None:
        """What `kept` holds in a dtype already."""
        return None if self._kept is None else self._kept.get(dtype)

    def _quantize(self, x: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        if self.phase is Phase.OBSERVE and self._gathers():
            self.observe(x)
        if self.scheme.dynamic:
            assert rows is None, "a lookup has a table, and its scales are kept"
            return _Dynamic.apply(
                x, self.global_scale, self._strength, self.scheme.grid, self._names, self._rule, dtype
            )
        more: dict[str, Any] = {"global_scale": self.global_scale, "strength": self._strength, "rows": rows}
        learns = self.phase is Phase.LEARN
        step = self.log_step if learns and self.estimator.learns_scale else self.log_step.detach()
        shift: Tensor | None = self.zero_step
        if shift is not None and not (learns and self.estimator.learns_zero):
            shift = shift.detach()
        return _FakeQuantize.apply(x, step, shift, self.scale, self.zero_point, self.scheme, self._rule, dtype, more)

    def _gathers(self) -> bool:
        if not (hasattr(self, "seen") and self.training):
            return False  # before what a compiler cannot trace
        return torch._C._current_graph_task_id() == -1  # not inside a backward pass: activation checkpointing

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
    """The opaque forward, and the opaque backward. Saves only x and what is served: levels are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_step: Tensor | None,
        zero_step: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        estimator: str,
        dtype: torch.dtype,
        more: dict[str, Any],
    ) -> Tensor:
        result, s = fake_quantize(
            x, scale, scheme.grid, dtype, log_step=log_step, zero_point=zero_point, zero_step=zero_step, **more
        )
        ctx.save_for_backward(x, s, zero_point, zero_step, more["strength"], more["rows"])
        ctx.grid, ctx.estimator = str(scheme.grid), estimator
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, s, zero_point, zero_step, strength, rows = ctx.saved_tensors
        x = taken(whole, rows)
        found = fake_quantize_backward(
            grads[0], x, s, ctx.grid, ctx.estimator, _elements(whole, x, s), ctx.needs_input_grad[:3],
            zero_point=taken(zero_point, rows), zero_step=taken(zero_step, rows), strength=strength,
        )  # fmt: skip
        dx, dlog, dzero = (_scattered(d, rows, len(whole)) for d in found)
        return dx, dlog, dzero, None, None, None, None, None, None


class _Dynamic(torch.autograd.Function):
    """The same for a scale that x itself gives; the scale has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        global_scale: Tensor | None,
        strength: Tensor | None,
        grid: Grid,
        names: tuple[str, str],
        estimator: str,
        dtype: torch.dtype,
    ) -> Tensor:
        result, s, zero_point = fake_quantize_dynamic(x, *names, dtype, global_scale=global_scale, strength=strength)
        ctx.save_for_backward(x, s, zero_point, strength)
        ctx.grid, ctx.estimator = str(grid), estimator
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, zero_point, strength = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], False, False)
        dx, _, _ = fake_quantize_backward(
            grads[0],
            x,
            s,
            ctx.grid,
            ctx.estimator,
            _elements(x, x, s),
            wanted,
            zero_point=zero_point,
            strength=strength,
        )
        return dx, None, None, None, None, None, None


def _elements(whole: Tensor, x: Tensor, s: Tensor) -> int:
    """Elements that share a scale, as `Rounded` counts them, of `x`, which is `whole` or some of its rows."""
    if whole.dim() != 2:
        return whole.shape[-1]
    return whole.numel() if s.dim() == 1 else x.numel() // s.numel()


def _scattered(grad: Tensor | None, rows: Tensor | None, count: int) -> Tensor | None:
    """The gradient of a matrix of `count` rows from that of some of them, as `F.embedding` has it: deterministic."""
    if grad is None or rows is None or grad.dim() < 2:
        return grad
    return torch.ops.aten.embedding_dense_backward(grad, rows, count, -1, False)
