"""Gradients in Triton: dx and masks bit for bit, sums against closed form in float64 within the stated bound."""

import copy
import math

import pytest
import torch
from tiny_grids import DTYPES, bits

pytest.importorskip("triton")

from qat.kernels.fake_quant import served_scale, served_zero
from qat.kernels.triton import fake_quant_backward as twin
from qat.nn.backward import MASKS, backward_reference
from qat.nn.estimators import LSQ, Clipped, EfficientQAT, LSQPlus, StraightThrough
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import group, rtn
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.levels import snap
from qat.numerics.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ESTIMATORS = [StraightThrough(), Clipped(), LSQ(), LSQ(False), LSQPlus(), EfficientQAT()]
GRIDS = [IntGrid(2), IntGrid(4), IntGrid(8), FloatGrid("e2m1"), FloatGrid("e4m3")]
RAGGED = [(1, 16, 16), (3, 60, 20), (7, 96, 32), (5, 192, 64), (130, 128, 128), (3, 100, None), (5, 576, None),
          (2, 1536, None), (2, 4096, None), (2, 5000, None), (1, 14336, None)]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def same(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def case(shape, grid, symmetric, source=torch.float32, upper=torch.float32):
    """grad, x, s, zero_point, zero_step, with a third of x beyond the grid and some of it on its edges."""
    rows, columns, size = shape
    x = torch.randn(rows, columns, device=DEVICE)
    _, scale, zero = rtn(
        x / 1.5, Scheme(grid, PerChannel() if size is None else PerGroup(size), symmetric), torch.float16
    )
    s = served_scale(scale, torch.randn(scale.shape, device=DEVICE) * 0.2).float()
    if symmetric and isinstance(grid, IntGrid):
        s.view(-1)[::3] *= -1  # as the signed convention has some
    step = None if zero is None else torch.randn(scale.shape, device=DEVICE) * 2
    z = 0 if zero is None else served_zero(zero, step, grid).float().unsqueeze(-1)
    edges = [grid.low, grid.high, grid.low - grid.outer, grid.high + grid.outer]
    grouped = group(x, s)
    for i, edge in enumerate(edges):
        grouped[..., i] = ((edge - z) * s.unsqueeze(-1)).squeeze(-1)
    return torch.randn_like(x).to(upper), grouped.reshape(x.shape).to(source), s, zero, step


def run(estimator, grid, grad, x, s, zero, step):
    """(ours, the reference's, what is wanted); LSQ's N is the group's size."""
    elements = x.numel() // s.numel()
    wanted = (True, estimator.learns_scale, estimator.learns_zero and zero is not None)
    factor = (elements * grid.high) ** -0.5 if getattr(estimator, "scale_gradient", False) else 1.0
    ours = twin.fake_quantize_backward(grad, x, s, zero, step, grid, MASKS[type(estimator)], factor, wanted)
    return ours, backward_reference(grad, x, s, zero, step, None, grid, estimator, elements, wanted), wanted


def closed_form(estimator, grid, grad, x, s, zero, step):
    """(dlog, dzero) in float64 from the forward's u, each with the sum of its terms' magnitudes."""
    u32 = group(x.float(), s) / s.unsqueeze(-1)
    z = None if zero is None else served_zero(zero, step, grid).float().unsqueeze(-1)
    u, level = u32.double(), snap(u32, grid, z).double()
    low, high = (edge - (0 if z is None else z.double()) for edge in (grid.low, grid.high))
    inside = (u > low) & (u < high)
    if MASKS[type(estimator)] == "rounded":
        code = torch.round(u)
        inside = (code >= low) & (code <= high)
        if isinstance(grid, FloatGrid):
            inside = (u > low - grid.outer) & (u < high + grid.outer)
    upper = group(grad.double(), s)
    g = 1 / math.sqrt(u.shape[-1] * grid.high) if getattr(estimator, "scale_gradient", False) else 1.0
    terms = (torch.where(inside, level - u, level) * upper, -upper * ~inside)
    return [((t * g).sum(-1) * s, (t * g).abs().sum(-1) * s.abs()) for t in terms]


def check(estimator, grid, parts):
    ours, theirs, wanted = run(estimator, grid, *parts)
    assert same(ours[0], theirs[0])  # and so the masks
    for found, reference, want, (exact, size) in zip(
        ours[1:], theirs[1:], wanted[1:], closed_form(estimator, grid, *parts), strict=True
    ):
        assert found.shape == reference.shape == (exact.shape if want else (0,))
        if want:
            assert bool(((found.double() - exact).abs() <= 64 * 2.0**-24 * size).all())


def symmetries(estimator, grid):
    if isinstance(grid, FloatGrid):
        return () if isinstance(estimator, LSQPlus) else (True,)
    return (False,) if isinstance(estimator, LSQPlus) else (True, False)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_gradients_are_the_closed_forms(estimator, shape):
    for grid in GRIDS:
        for symmetric in symmetries(estimator, grid):
            check(estimator, grid, case(shape, grid, symmetric))


def test_only_what_is_wanted_is_computed():
    parts, grid = case((4, 96, 32), IntGrid(4), False), IntGrid(4)
    whole = twin.fake_quantize_backward(*parts, grid, "between", 1.0, (True, True, True))
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        found = twin.fake_quantize_backward(*parts, grid, "between", 1.0, wanted)
        for part, expected, want in zip(found, whole, wanted, strict=True):
            assert torch.equal(part, expected) if want else part.numel() == 0


def test_a_gradient_may_lie_in_memory_otherwise():
    grad, *rest = case((32, 96, 32), IntGrid(4), True)
    scattered = grad.t().contiguous().t()
    assert not scattered.is_contiguous()
    for g, plain in ((scattered, grad), (torch.ones(1, 1, device=DEVICE).expand(32, 96), torch.ones_like(grad))):
        a, b = (
            twin.fake_quantize_backward(t, *rest, IntGrid(4), "between", 1.0, (True, True, False)) for t in (g, plain)
        )
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def quant(estimator, shape, symmetric=True, granularity=None):
    scheme = Scheme(IntGrid(4), granularity or PerGroup(64), symmetric)
    made = FakeQuantize(scheme, shape, MinMax(), estimator, torch.bfloat16, "w", torch.device("cuda"))
    w = torch.randn(shape, device="cuda")
    made.observe(w / 1.5)
    made.phase = Phase.LEARN
    with torch.no_grad():
        made.log_step.normal_(0, 0.1)
    return made, w


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("dtypes", [(s, u) for s in DTYPES for u in DTYPES], ids=str)
def test_gradients_of_every_dtype_and_shape(dtypes, estimator):
    """All shapes as a step has them, bf16 gradients of fp32 masters; other dtypes on two of them."""
    shapes = [(576, 1536, 64), (257, 576, None)]
    if dtypes == (torch.float32, torch.bfloat16):
        shapes += [*RAGGED, (1024, 4096, 128), (257, 14336, None)]
    for shape in shapes:
        for grid in [IntGrid(b) for b in range(2, 9)] + GRIDS[3:]:
            for symmetric in symmetries(estimator, grid):
                check(estimator, grid, case(shape, grid, symmetric, *dtypes))


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", [(256, 1536), (256, 576)], ids=str)
def test_two_runs_have_the_same_bits_eager_and_compiled(estimator, shape, monkeypatch):
    calls, original = [], twin.fake_quantize_backward
    monkeypatch.setattr(twin, "fake_quantize_backward", lambda *a: calls.append(1) or original(*a))
    for granularity in (PerGroup(64), PerChannel()):
        made, w = quant(estimator, shape, symmetric=False, granularity=granularity)
        grad, found = torch.randn(shape, device="cuda").bfloat16(), []
        torch._dynamo.reset()
        for call in (made, made, torch.compile(made, fullgraph=True), torch.compile(made, fullgraph=True)):
            made.zero_grad(set_to_none=True)
            x = w.clone().requires_grad_()
            result = call(x, torch.bfloat16)
            result.backward(grad)
            found.append([result, x.grad, *(p.grad for p in made.parameters() if p.grad is not None)])
        assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert len(calls) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", [LSQ(), Clipped(), LSQPlus()], ids=str)
def test_a_step_captured_in_a_graph_replays_what_runs_eagerly(estimator):
    made, w = quant(estimator, (512, 1024), symmetric=False)
    eager, w_eager = copy.deepcopy(made), w.clone().requires_grad_()
    w.requires_grad_()
    grad = torch.randn(512, 1024, device="cuda").bfloat16()

    def step(module, x):
        module.zero_grad(set_to_none=True)
        x.grad = None
        result = module(x, torch.bfloat16)
        result.backward(grad)
        return result

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(made, w)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    made.zero_grad(set_to_none=True)
    w.grad = None
    with torch.cuda.graph(graph):
        result = made(w, torch.bfloat16)
        result.backward(grad)
    for _ in range(3):
        with torch.no_grad():
            w.normal_()
            grad.normal_()
            w_eager.copy_(w)
        graph.replay()
        expected = step(eager, w_eager)
        assert same(result, expected)
        assert same(w.grad, w_eager.grad)
        for ours, theirs in zip(made.parameters(), eager.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or same(ours.grad, theirs.grad)
