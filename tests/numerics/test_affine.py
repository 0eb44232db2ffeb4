"""The algebra against exact arithmetic, and law (b) at its root."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from tiny_grids import OTHERS

from qat.numerics.affine import dequantize, divisor, qparams, quantize, ranges, round_scale, rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

SIGNED = Scheme(IntGrid(4), PerChannel(), convention="signed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(16), PerToken())


def schemes():
    for bits in range(2, 9):
        for granularity in GRANULARITIES:
            for symmetric in (True, False):
                yield Scheme(IntGrid(bits), granularity, symmetric, dynamic=isinstance(granularity, PerToken))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_values_equal_exact_arithmetic(bits, symmetric):
    """Every code is the nearest integer to the exact quotient of fp32 numbers, as fp32 division rounds it."""
    x = torch.randn(4, 32)
    scheme = Scheme(IntGrid(bits), PerGroup(16), symmetric)
    codes, scale, zero = rtn(x, scheme, torch.bfloat16)
    grid = scheme.grid
    back = dequantize(codes, scale, zero, torch.float32)
    for row in range(4):
        for column in range(32):
            s = Fraction(float(scale[row, column // 16]))
            z = 0 if zero is None else int(zero[row, column // 16])
            quotient = torch.tensor(float(x[row, column])) / torch.tensor(float(s))
            expected = min(max(round(Fraction(float(quotient))) + z, grid.qmin), grid.qmax)
            assert int(codes[row, column]) == expected
            assert float(back[row, column]) == float(torch.tensor(float((expected - z) * s)))


@pytest.mark.parametrize("scheme", list(schemes()), ids=str)
def test_rtn_is_within_half_a_step_inside_the_range(scheme):
    x = torch.randn(8, 64)
    codes, scale, zero = rtn(x, scheme, torch.float32)
    assert codes.dtype == torch.int8
    assert codes.min() >= scheme.grid.qmin
    assert codes.max() <= scheme.grid.qmax
    back = dequantize(codes, scale, zero, torch.float32)
    steps = (back - x).abs().reshape(*scale.shape, -1) / scale.unsqueeze(-1)
    clipped = (codes == scheme.grid.qmax) | (codes == scheme.grid.qmin)
    inside = steps[~clipped.reshape(steps.shape)]
    assert inside.numel() == 0 or float(inside.max()) <= 0.5 + 1e-5
    assert float(steps.max()) <= 1.0 + 1e-4  # ct clips at most half a step of the largest element


def test_symmetric_scale_is_absmax_over_half_the_steps():
    x = torch.tensor([[-7.5, 1.0, 3.0, 7.0]])
    codes, scale, zero = rtn(x, Scheme(IntGrid(4), PerChannel()), torch.float32)
    assert float(scale) == 1.0
    assert zero is None
    assert codes.tolist() == [[-8, 1, 3, 7]]


def test_a_signed_scale_has_the_smallest_code_at_the_longer_end():
    x = torch.tensor([[-8.0, 1.0, 3.0, 7.0], [8.0, -1.0, -3.0, -7.0], [4.0, 1.0, 0.0, 2.0], [-2.0, 2.0, 1.0, 0.0]])
    codes, scale, zero = rtn(x, SIGNED, torch.float32)
    assert scale.flatten().tolist() == [1.0, -1.0, -0.5, 0.25]
    assert zero is None
    assert codes.tolist() == [[-8, 1, 3, 7], [-8, 1, 3, 7], [-8, -2, 0, -4], [-8, 7, 4, 0]]
    assert torch.equal(qparams(torch.zeros(2), torch.zeros(2), SIGNED, torch.float32)[0], torch.ones(2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_scales_clip_nothing_but_the_shorter_end_and_a_mirrored_range_has_the_other_sign(bits):
    scheme, x = replace(SIGNED, grid=IntGrid(bits)), torch.randn(64, 32)
    lo, hi = ranges(x, scheme)
    scale, _ = qparams(lo, hi, scheme, torch.float32)
    back = dequantize(quantize(x, scale, None, scheme.grid), scale, None, torch.float32)
    steps = (back - x).abs() / scale.abs()
    assert torch.equal(scale.sign(), torch.where(hi > -lo, -1.0, 1.0))
    assert float(steps.gather(1, x.abs().argmax(1, keepdim=True)).max()) < 1e-5  # the largest magnitude is a level
    assert float(steps.max()) <= 1 + 1e-5  # the other end has one level less
    assert torch.equal(qparams(-hi, -lo, scheme, torch.float32)[0], -scale)


def test_halves_round_to_even_and_the_zero_point_is_added_after():
    scale, zero = torch.ones(1), torch.tensor([1], dtype=torch.int8)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, scale, None, IntGrid(8)).tolist() == [-2, -2, 0, 0, 2, 2]
    assert quantize(x, scale, zero, IntGrid(8)).tolist() == [-1, -1, 1, 1, 3, 3]  # rint(x + 1) would give -2, 0, ...


def test_codes_come_from_the_rounded_scale():
    """A weight whose code differs between the exact and the stored scale takes the stored one's."""
    x = torch.randn(64, 64)
    scheme = Scheme(IntGrid(8), PerChannel())
    codes, scale, _ = rtn(x, scheme, torch.bfloat16)
    exact, _ = qparams(*ranges(x, scheme), scheme, torch.float32)
    assert not torch.equal(codes, quantize(x, exact, None, scheme.grid))
    assert torch.equal(codes, quantize(x, scale.float(), None, scheme.grid))


def test_asymmetric_ranges_hold_zero_and_zero_is_a_code():
    for x in (torch.rand(1, 16) + 3, -torch.rand(1, 16) - 3):
        scheme = Scheme(IntGrid(4), PerChannel(), symmetric=False)
        codes, scale, zero = rtn(x, scheme, torch.float32)
        lo, hi = (
            float(v) for v in dequantize(torch.tensor([[-8, 7]], dtype=torch.int8), scale, zero, torch.float32)[0]
        )
        assert lo <= 0 <= hi
        assert float(dequantize(quantize(torch.zeros(1, 1), scale, zero, scheme.grid), scale, zero, torch.float32)) == 0
        assert (dequantize(codes, scale, zero, torch.float32) - x).abs().max() <= scale.max() * 0.51


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_groups(dtype, symmetric):
    scheme = Scheme(IntGrid(4), PerGroup(4), symmetric)
    tiny = torch.finfo(torch.float32).tiny / 1024  # its scale underflows every dtype but float32
    x = torch.tensor([[0.0] * 4 + [tiny] * 4 + [1.0, 1.0, 1.0, 1.0]])
    codes, scale, zero = rtn(x, scheme, dtype)
    assert float(scale[0, 0]) == 1.0
    assert codes[0, :4].tolist() == [0] * 4
    assert zero is None or int(zero[0, 0]) == 0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert 0 < float(scale[0, 1]) <= max(smallest, tiny)
    assert bool(torch.isfinite(dequantize(codes, scale, zero, dtype)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error(value):
    x = torch.randn(2, 16)
    x[1, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        rtn(x, Scheme(IntGrid(4), PerChannel()), torch.bfloat16)


def test_a_scale_beyond_its_dtype_is_an_error():
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        rtn(torch.full((1, 4), 1e6), Scheme(IntGrid(2), PerChannel()), torch.float16)


def test_a_tensor_too_small_for_its_divisor_is_still_rounded():
    """448 * 6 / amax is beyond fp32; the largest number takes its place, and scales reach down to it."""
    x = torch.tensor([[1e-37, -5e-38, 2.5e-38, 0.0] * 4])
    g = divisor((x,), OTHERS["nvfp4"])
    assert float(g) == torch.finfo(torch.float32).max
    codes, scale, _ = rtn(x, OTHERS["nvfp4"], torch.bfloat16, g)
    back = dequantize(codes, scale, None, torch.float32, OTHERS["nvfp4"].grid, g)
    assert bool(((back - x).abs() <= 0.25 * x.abs()).all())


def test_a_scheme_may_fix_the_dtype_of_its_scale():
    scheme = Scheme(IntGrid(4), PerChannel(), scale_dtype="float32")
    assert rtn(torch.randn(2, 8), scheme, torch.bfloat16)[1].dtype == torch.float32


def test_round_scale_never_gives_zero():
    scales = torch.tensor([1e-45, 1e-30, 1.0])
    for dtype in DTYPES:
        assert bool((round_scale(scales, dtype) > 0).all())
        assert torch.equal(round_scale(-scales, dtype), -round_scale(scales, dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_torchaos_codes_mean_the_same_and_differ_from_ours_on_ties_alone(bits, mapping):
    """It multiplies by a reciprocal where we divide, which moves a code where x / s is within 2 ulp of a half."""
    peer = pytest.importorskip("torchao.quantization.quant_primitives")
    grid, shape, block, moved = IntGrid(bits), (256, 4), (1, 32), 0
    for seed in range(10):
        x = torch.randn(256, 128, generator=torch.Generator().manual_seed(seed))
        ends, dtypes = (
            (torch.int8, grid.qmin, grid.qmax),
            {"scale_dtype": torch.float32, "zero_point_dtype": torch.int32},
        )
        s, z = peer.choose_qparams_affine(x, peer.MappingType[mapping], block, *ends, **dtypes)
        theirs, zero = peer.quantize_affine(x, block, s, z, *ends), z.view(shape).to(torch.int8)
        for dtype in DTYPES:
            expected = peer.dequantize_affine(theirs, block, s, z, *ends, output_dtype=dtype)
            assert torch.equal(dequantize(theirs, s.view(shape), zero, dtype), expected)
        ours = quantize(x, s.view(shape), zero, grid)
        differs = ours != theirs
        assert (ours.int() - theirs.int()).abs().max() <= 1
        u = (x.double().view(*shape, 32) / s.double().view(*shape, 1)).view(x.shape)[differs]
        assert bool(((u - u.floor() - 0.5).abs() <= 2 * 2.0**-23 * u.abs()).all())
        moved += int(differs.sum())
    assert moved <= 0.005 * 10 * x.numel()  # found: 0.5 % at 8 bits, none below


@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_zero_point_follows_from_the_scale_as_stored(width):
    """Not from the scale before rounding, by which some of them would differ."""
    lo, hi = -torch.rand(4096) * 3, torch.rand(4096) * 3
    own = Scheme(IntGrid(width), PerChannel(), symmetric=False)
    scale, zero = qparams(lo, hi, own, torch.bfloat16)
    low, high = own.grid.qmin, own.grid.qmax
    assert torch.equal(zero.float(), torch.round(low - lo / scale.float()).clamp(low, high))
    unrounded = (hi - lo) / (high - low)
    assert not torch.equal(zero.float(), torch.round(low - lo / unrounded).clamp(low, high))


def test_e8m0_scales_are_the_nearest_power_of_two_on_a_logarithmic_axis():
    """Half way between two powers, by their logarithms, is sqrt(2) times the lower one."""
    exponent = torch.arange(-120, 120, dtype=torch.float64)
    for factor, up in ((1.0, 0), (1.41421, 0), (1.41422, 1), (1.5, 1), (1.99, 1)):
        found = round_scale((factor * 2.0**exponent).float(), torch.float8_e8m0fnu)
        assert torch.equal(found.double(), 2.0 ** (exponent + up)), factor
