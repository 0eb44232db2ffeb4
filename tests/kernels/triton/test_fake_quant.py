"""Triton equals the reference: its logic everywhere, its bits on a GPU."""

import pytest
import torch
from tiny_grids import DTYPES, OTHERS, bits, thousand_seeds

pytest.importorskip("triton")

from qat.kernels.fake_quant import fake_quantize, fake_quantize_reference, served_scale, watch
from qat.kernels.triton import fake_quant as twin
from qat.numerics.affine import divisor, rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTEGERS = {
    f"int{b}{'' if s else '_asym'}_{type(g).__name__}": Scheme(IntGrid(b), g, s)
    for b in range(2, 9)
    for s in (True, False)
    for g in (PerGroup(16), PerChannel(), PerTensor())
}
FLOATS = {name: s for name, s in OTHERS.items() if not isinstance(s.grid, Codebook)}
RAGGED = [(1, 16, 16), (3, 60, 20), (7, 96, 32), (5, 192, 64), (130, 128, 128), (3, 100, None), (5, 576, None),
          (3, 1536, None), (2, 4096, None), (2, 5000, None), (1, 14336, None)]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def same(a, b):
    """Bit for bit; of NaN, that it is NaN."""
    return a.dtype == b.dtype and bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def given(x, s, storage, learned):
    """(scale, log_step, zero_point, zero_step, global_scale) of a scheme."""
    g = divisor((x,), s)
    _, scale, zero = rtn(x, s, storage, g)
    step = torch.randn(scale.shape, device=x.device) * 0.3 if learned else None
    shift = torch.randn(scale.shape, device=x.device) * 2 if learned and zero is not None else None
    return scale, step, zero, shift, g


def both(x, parts, s, dtype):
    return twin.fake_quantize(x, *parts, s.grid, dtype), fake_quantize_reference(x, *parts, s.grid, None, dtype)


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("grid", [IntGrid(2), IntGrid(4), IntGrid(8), FloatGrid("e2m1"), FloatGrid("e4m3")], ids=str)
def test_shapes_grids_and_zero_points(grid, shape):
    """With scales as they were observed: the interpreter's exp is another."""
    rows, columns, size = shape
    x = torch.randn(rows, columns, device=DEVICE)
    x[0, :3] = torch.tensor([0.0, -0.0, -1e-30])
    granularity = PerChannel() if size is None else PerGroup(size)
    for symmetric in (True, False) if isinstance(grid, IntGrid) else (True,):
        s = Scheme(grid, granularity, symmetric)
        scale, _, zero, _, _ = given(x, s, torch.float16, False)
        shift = None if zero is None else torch.randn(scale.shape, device=DEVICE) * 2
        for dtype in (torch.float32, torch.float16):
            (a, s_a), (b, s_b) = both(x, (scale, None, zero, shift, None), s, dtype)
            assert same(a, b)
            assert torch.equal(s_a, s_b)


def test_a_learned_step_and_scales_that_the_kernel_does_not_know():
    x = torch.randn(6, 64, device=DEVICE)
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        (a, s_a), (b, s_b) = both(x, given(x, OTHERS[name], torch.bfloat16, True), OTHERS[name], torch.float32)
        assert torch.equal(s_a, s_b)
        assert same(a, b)
    s = Scheme(IntGrid(4), PerGroup(32))
    scale, step, *_ = given(x, s, torch.float32, True)
    a, found = twin.fake_quantize(x, scale, step, None, None, None, s.grid, torch.float32)
    assert torch.allclose(found, served_scale(scale, step), rtol=1e-6)
    assert same(a, fake_quantize_reference(x, found, None, None, None, None, s.grid, None, torch.float32)[0])


def test_torch_may_compute_exp_instead(monkeypatch):
    monkeypatch.setattr(twin, "EXP_IN_KERNEL", False)
    x, s = torch.randn(6, 64, device=DEVICE), Scheme(IntGrid(4), PerGroup(32))
    for storage in DTYPES:
        (a, s_a), (b, s_b) = both(x, given(x, s, storage, True), s, torch.float32)
        assert torch.equal(s_a, s_b)
        assert same(a, b)


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], device=DEVICE)
    scales = [torch.tensor([[v]], device=DEVICE) for v in (0.5, float("inf"), float("nan"))]
    for grid in (IntGrid(4), FloatGrid("e2m1"), FloatGrid("e4m3")):
        for scale in scales:
            s = Scheme(grid, PerChannel(), scale_dtype="float32")
            (a, s_a), (b, s_b) = both(x, (scale, None, None, None, None), s, torch.float32)
            assert same(a, b)
            assert same(s_a, s_b)


def test_nothing_is_rounded_to_nothing():
    x = torch.empty(0, 64, device=DEVICE)
    result, s = twin.fake_quantize(
        x, torch.ones(0, 2, device=DEVICE), None, None, None, None, IntGrid(4), torch.float32
    )
    assert result.shape == (0, 64)
    assert s.shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("s", [*INTEGERS.values(), *FLOATS.values()], ids=[*INTEGERS, *FLOATS])
def test_bits_are_the_references_over_a_thousand_seeds(s, learned, dtype):
    whole = thousand_seeds().cuda()
    pairs = {(source, torch.bfloat16) for source in DTYPES} | {(torch.float32, storage) for storage in DTYPES}
    for source, storage in pairs:
        x = whole.to(source)
        (a, s_a), (b, s_b) = both(x, given(x.float(), s, storage, learned), s, dtype)
        assert torch.equal(s_a, s_b), (source, storage)
        assert same(a, b), (source, storage)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*RAGGED, (576, 1536, 64), (4096, 4096, 128), (257, 14336, None)], ids=str)
@pytest.mark.parametrize("grid", [*map(IntGrid, range(2, 9)), FloatGrid("e2m1"), FloatGrid("e4m3")], ids=str)
def test_bits_are_the_references_on_ragged_shapes(grid, shape):
    rows, columns, size = shape
    x = torch.randn(rows, columns, device="cuda")
    x[0, :4] = torch.tensor([0.0, -0.0, -1e-30, 1e-42])
    granularity = PerChannel() if size is None else PerGroup(size)
    for symmetric in (True, False) if isinstance(grid, IntGrid) else (True,):
        s = Scheme(grid, granularity, symmetric)
        (a, s_a), (b, s_b) = both(x, given(x, s, torch.bfloat16, True), s, torch.bfloat16)
        assert torch.equal(s_a, s_b)
        assert same(a, b)


@pytest.mark.gpu
def test_the_operator_calls_it_and_a_watcher_sees_eager_compiled_and_replayed_rows(monkeypatch):
    calls, original = [], twin.fake_quantize
    monkeypatch.setattr(twin, "fake_quantize", lambda *a: calls.append(1) or original(*a))
    x, s = torch.randn(64, 128, device="cuda"), Scheme(IntGrid(4), PerGroup(32), symmetric=False)
    scale, step, zero, shift, _ = given(x, s, torch.bfloat16, True)
    rows, seen = torch.tensor([5, 0, 5], device="cuda"), []

    def call(x, rows=None):
        learned = {"log_step": step, "zero_point": zero, "zero_step": shift}
        return fake_quantize(x, scale, s.grid, torch.bfloat16, **learned, rows=rows)[0]

    expected, _ = fake_quantize_reference(x, scale, step, zero, shift, None, s.grid, None, torch.bfloat16)
    compiled = torch.compile(call, fullgraph=True)
    compiled(x)
    with watch(lambda scale, result, rows: seen.append((scale.data_ptr(), result.clone(), rows))):
        assert same(call(x), expected)
        assert same(compiled(x), expected)
        assert same(call(x, rows), expected[rows])
    assert [p for p, _, _ in seen] == [scale.data_ptr()] * 3
    assert same(seen[0][1], expected)
    assert same(seen[1][1], expected)
    assert same(seen[2][1], expected[rows])
    assert len(calls) == 4
    ramp, _ = fake_quantize(x, scale, s.grid, torch.float32, zero_point=zero, strength=torch.tensor(0.5))
    assert ramp.shape == x.shape
    assert len(calls) == 4  # a ramp is the reference's


@pytest.mark.gpu
def test_captured_in_a_graph_it_replays_the_same_bits():
    s = Scheme(IntGrid(4), PerGroup(64))
    x = torch.randn(512, 1024, device="cuda")
    scale, step, *_ = given(x, s, torch.bfloat16, True)

    def call():
        return fake_quantize(x, scale, s.grid, torch.bfloat16, log_step=step)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        x.normal_()
        step.normal_(0, 0.3)
        graph.replay()
        assert same(
            captured, fake_quantize_reference(x, scale, step, None, None, None, s.grid, None, torch.bfloat16)[0]
        )


@pytest.mark.gpu
def test_a_tensor_of_the_second_gpu_stays_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, s = torch.randn(8, 64, device="cuda:1"), Scheme(IntGrid(4), PerGroup(32))
    (a, _), (b, _) = both(x, given(x, s, torch.bfloat16, True), s, torch.bfloat16)
    assert same(a, b)
