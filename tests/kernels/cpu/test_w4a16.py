"""Law (d): the CPU operators equal the reference within the bound that their module derives."""

import pytest
import torch
import torch.nn.functional as F

from qat.kernels.cpu import w4a16 as cpu
from qat.kernels.w4a16 import Table, linear, linear_reference, pack_weight
from qat.numerics.affine import rtn
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

U = 2.0**-8
ROWS = [16, 48, 64, 80, 192]  # ragged against the layouts' blocks of 32 and 64
TOKENS = [1, 2, 5, 33]


def quantized(
    rows: int, columns: int, bits: int, granularity: Granularity, symmetric: bool, scale: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    scheme = Scheme(IntGrid(bits), granularity, symmetric, convention="signed")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) + 0.2
    return QuantizedTensor(*rtn(weight, scheme, scale), scheme, (rows, columns))


def bound(x: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """The module's bound, `[T, O]`."""
    weight = tensor.dequantize(torch.float32)
    offset = torch.zeros_like(weight)
    if tensor.zero_point is not None:
        zero_scale = (tensor.zero_point.float() * tensor.scale.float()).abs().view(-1, 1)
        offset = zero_scale.expand(-1, weight.numel() // zero_scale.numel()).reshape(weight.shape)
    terms = 3 * U * weight.abs() + 2 * U * offset + weight.shape[1] * 2.0**-23 * (weight.abs() + 2 * offset)
    second_order = 1 + 4 * U
    return second_order * (U * F.linear(x, weight).abs() + F.linear(x.abs(), terms))


def check(fast: cpu.Int4Weight | cpu.Int8Weight, tensor: QuantizedTensor) -> None:
    for count in TOKENS:
        x = torch.randn(count, tensor.shape[1], generator=torch.Generator().manual_seed(count))
        reference = linear_reference(x, pack_weight(tensor))
        for y in (fast.by_operator(x).float(), linear(x, fast), linear(x[None], fast)[0]):
            assert bool(((y - reference).abs() <= bound(x, tensor)).all())
        if isinstance(fast, cpu.Int8Weight) or fast.block:
            assert bool(((fast.by_tiles(x) - reference).abs() <= bound(x, tensor)).all())
            if tensor.zero_point is None and tensor.scale.dtype == torch.bfloat16:
                torch.testing.assert_close(
                    fast.by_tiles(x), reference, rtol=1e-5, atol=1e-4
                )  # nothing is rounded to bf16


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(64), PerGroup(128), PerChannel(), PerTensor()], ids=str)
def test_four_bits(rows: int, symmetric: bool, granularity: Granularity) -> None:
    tensor = quantized(rows, 384, 4, granularity, symmetric)
    fast = cpu.int4_weight(pack_weight(tensor))
    assert fast is not None
    check(fast, tensor)


def test_four_bits_with_scales_beyond_bf16() -> None:
    tensor = quantized(64, 256, 4, PerGroup(64), symmetric=False, scale=torch.float32)
    fast = cpu.int4_weight(pack_weight(tensor))
    assert fast is not None
    check(fast, tensor)


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
def test_eight_bits(rows: int, granularity: Granularity, scale: torch.dtype) -> None:
    tensor = quantized(rows, 96, 8, granularity, symmetric=True, scale=scale)
    fast = cpu.int8_weight(pack_weight(tensor))
    assert fast is not None
    check(fast, tensor)
    ids = torch.tensor([rows - 1, 0, 0])
    expected = tensor.dequantize(torch.float32)[ids]
    assert isinstance(fast, Table)
    assert bool(((fast.lookup(ids, torch.float32) - expected).abs() <= U * expected.abs()).all())
    if scale == torch.bfloat16:
        assert torch.equal(fast.lookup(ids, torch.bfloat16), tensor.dequantize(torch.bfloat16)[ids])


def test_this_machines_layout_reads_back() -> None:
    tensor = quantized(192, 128, 4, PerGroup(64), symmetric=True)
    fast = cpu.int4_weight(pack_weight(tensor))
    assert fast is not None
    assert not isinstance(fast, Table)  # rows lie interleaved
    if fast.block:
        assert torch.equal(fast.columns(64, 192).T.to(torch.int8) - 8, tensor.codes[64:192])
    elif torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        pytest.fail("the layout of this instruction set is known")


def test_operators_refuse_what_they_cannot_serve() -> None:
    assert cpu.int4_weight(pack_weight(quantized(40, 128, 4, PerGroup(64), symmetric=True))) is None  # rows
    assert cpu.int4_weight(pack_weight(quantized(48, 120, 4, PerGroup(24), symmetric=True))) is None  # group
    assert cpu.int4_weight(pack_weight(quantized(48, 128, 3, PerGroup(64), symmetric=True))) is None  # width
    assert cpu.int8_weight(pack_weight(quantized(48, 128, 8, PerChannel(), symmetric=False))) is None
    assert cpu.int8_weight(pack_weight(quantized(48, 128, 8, PerGroup(64), symmetric=True))) is None
    assert cpu.int8_weight(pack_weight(quantized(48, 100, 8, PerChannel(), symmetric=True))) is None  # columns


def test_the_probe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pack_weight(quantized(64, 256, 4, PerGroup(32), symmetric=True))
    measured = {"linear_reference": 9.0, "by_operator": 1.0, "by_tiles": 5.0}

    def seconds(kernel: object, x: torch.Tensor) -> float:
        name = getattr(kernel, "__name__", "")
        return measured["linear_reference" if name == "<lambda>" else name] * (1 if name == "by_tiles" else len(x))

    monkeypatch.setattr(cpu, "_seconds", seconds)
    monkeypatch.setattr(cpu, "_measured", {})
    fast = cpu.specialize(weight, spare=1 << 20)
    assert isinstance(fast, cpu.Int4Weight)
    assert fast.crossover == (32 if fast.block else cpu.NEVER)
    extra = fast.nbytes - weight.nbytes
    assert cpu.specialize(weight, spare=extra - 1) is weight  # would not fit
    measured["linear_reference"] = 0.5
    monkeypatch.setattr(cpu, "_measured", {})
    assert cpu.specialize(weight, spare=extra) is weight  # would not be faster


def test_an_operator_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pack_weight(quantized(64, 256, 4, PerGroup(32), symmetric=True))
    monkeypatch.setattr(cpu, "_measured", {})
    operator = cpu.Int4Weight.by_operator
    monkeypatch.setattr(cpu.Int4Weight, "by_operator", lambda self, x: operator(self, x) * float("nan"))
    assert cpu.specialize(weight, spare=1 << 20) is weight


def test_the_probe_runs() -> None:
    weight = pack_weight(quantized(64, 256, 8, PerChannel(), symmetric=True))
    x = torch.randn(3, 256)
    fast = cpu.specialize(weight, spare=1 << 20)
    assert fast.matmul(x).shape == (3, 64)
