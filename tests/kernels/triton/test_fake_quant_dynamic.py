"""Dynamic scales in Triton: range, scale and result are the reference's, bit for bit, in the interpreter too."""

import pytest
import torch
from tiny_grids import DTYPES, bits, thousand_seeds

pytest.importorskip("triton")

from qat.kernels.fake_quant import fake_quantize_reference, watch
from qat.kernels.triton import fake_quant_dynamic as twin
from qat.nn.estimators import Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.percentile import Percentile
from qat.numerics.affine import divisor
from qat.numerics.granularity import PerGroup, PerToken
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.scheme import E4M3, E8M0, Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = {
    "int8_vllm": Scheme(IntGrid(8), PerToken(), dynamic=True, convention="vllm"),
    "int8_ct": Scheme(IntGrid(8), PerToken(), dynamic=True),
    "int4_g32": Scheme(IntGrid(4), PerGroup(32), dynamic=True, scale_dtype="float32"),
    "fp8": Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True),
    "nvfp4": Scheme(FloatGrid("e2m1"), PerGroup(16), dynamic=True, scale_dtype=E4M3),
    "mxfp4": Scheme(FloatGrid("e2m1"), PerGroup(32), dynamic=True, scale_dtype=E8M0),
    "mxfp8": Scheme(FloatGrid("e4m3"), PerGroup(32), dynamic=True, scale_dtype=E8M0),
}
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def same(a, b):
    """Bit for bit; of NaN, that it is NaN."""
    return a.dtype == b.dtype and bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def reference(x, s, dtype, g):
    scale, zero = MinMax().qparams(x, s, torch.float32, g, check=False)
    return fake_quantize_reference(x, scale, None, zero, None, g, s.grid, None, dtype)


def check(x, s, dtype, g=None):
    g = divisor((x,), s) if g is None else g
    (a, s_a), (b, s_b) = twin.fake_quantize_dynamic(x, g, s, dtype), reference(x, s, dtype, g)
    assert same(s_a, s_b)
    assert same(a, b)


def special(columns):
    """Rows of zeros, of subnormals, of one size, of the largest numbers and of both zeros."""
    x = torch.randn(8, columns) * torch.logspace(-38, 30, 8)[:, None]
    x[1], x[2], x[3] = 0, 1e-42, 7.0
    x[4] = torch.tensor([0.0, -0.0]).repeat(columns // 2)
    x[5, ::7] = -1e-30
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_it_is_the_reference(s, dtype):
    for shape in ((3, 96), (2, 3, 64), (1, 576), (2, 1536), (1, 1, 4096)):
        check(torch.randn(shape, device=DEVICE), s, dtype)
    one = torch.ones(1, device=DEVICE) if s.two_level else None
    check(special(96), s, dtype, one)
    if s.two_level:
        check(torch.randn(4, 96, device=DEVICE) * 100, s, dtype, one * 50)  # scales saturate at 448


@pytest.mark.parametrize("name", ["int8_vllm", "fp8", "nvfp4"])
def test_what_is_not_finite_spoils_its_group_alone(name):
    s, x = SCHEMES[name], torch.randn(4, 64, device=DEVICE)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    check(x, s, torch.float32, torch.ones(1, device=DEVICE) if s.two_level else None)


def test_nothing_is_rounded_to_nothing():
    result, s = twin.fake_quantize_dynamic(torch.empty(2, 0, 64, device=DEVICE), None, SCHEMES["fp8"], torch.float32)
    assert result.shape == (2, 0, 64)
    assert s.shape == (2, 0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_bits_are_the_references_over_a_thousand_seeds(s, source):
    for dtype in DTYPES:
        check(thousand_seeds().cuda().to(source), s, dtype)
    for columns in (64, 576, 1536, 4096, 14336, 16384):
        check((torch.randn(67, columns, device="cuda") * 3).to(source), s, torch.bfloat16)
    if source is torch.float32:
        check(special(96), s, torch.bfloat16, torch.ones(1, device="cuda") if s.two_level else None)


def module(s, observer):
    quant = FakeQuantize(s, None, observer, Clipped(), torch.bfloat16, "x", torch.device("cuda"), running=True)
    quant(torch.randn(64, 576, device="cuda") * 2, torch.float32)
    quant.phase = Phase.FROZEN
    return quant


@pytest.mark.gpu
@pytest.mark.parametrize("observer", [MinMax(), Percentile(99.0)], ids=str)
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_eager_compiled_and_replayed_are_one_and_a_watcher_sees_it(s, observer, monkeypatch):
    calls, original = [], twin.fake_quantize_dynamic
    monkeypatch.setattr(twin, "fake_quantize_dynamic", lambda *a: calls.append(1) or original(*a))
    quant, x, seen = module(s, observer), torch.randn(64, 576, device="cuda").bfloat16(), []
    calls.clear()
    grad = torch.randn(64, 576, device="cuda").bfloat16()
    scale, zero = observer.qparams(x, s, torch.float32, quant.global_scale, check=False)
    expected, _ = fake_quantize_reference(x, scale, None, zero, None, quant.global_scale, s.grid, None, torch.bfloat16)
    torch._dynamo.reset()
    compiled, gradients = torch.compile(quant, fullgraph=True), []
    with watch(lambda scale, result, rows: seen.append(result.clone())):
        for call in (quant, compiled):
            leaf = x.clone().requires_grad_()
            result = call(leaf, torch.bfloat16)
            result.backward(grad)
            assert same(result, expected)
            gradients.append(leaf.grad)
    assert len(seen) == 2
    assert all(same(result, expected) for result in seen)
    assert same(*gradients)
    assert len(calls) == (2 if isinstance(observer, MinMax) else 0)
    if not isinstance(observer, MinMax):
        return
    leaf = x.clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quant(leaf, torch.bfloat16)
        captured.backward(grad)
    for _ in range(2):
        with torch.no_grad():
            leaf.normal_()
        graph.replay()
        assert same(captured, quant(leaf.detach(), torch.bfloat16))
