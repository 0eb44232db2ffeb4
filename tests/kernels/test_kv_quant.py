"""Keys and values as codes: the definition, and one operator that is it."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from torch import Tensor

from qat.kernels.kv_quant import dequantize_kv, fake_quantize_kv, quantize_kv
from qat.numerics.kv import KINDS, vector_bytes

REACH = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors of very different sizes, with outliers as keys have them; one is zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.logspace(-3, 2, shape[-2])[:, None]
    x[..., 3] *= 20
    x[..., 0, :] = 0
    return x.to(dtype)


def specified(x: Tensor, kind: str) -> Tensor:
    """The definition in fp64: exact quotients and products of fp32 numbers, rounded where the definition rounds."""
    span = x.double().abs().amax(-1, keepdim=True)
    s = torch.where(span == 0, 1, span / REACH[kind]).float().double()
    v = (x.double() / s).float()
    q = v.to(torch.float8_e4m3fn).double() if kind == "fp8" else v.round().double()
    return (q * s).float().to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition(kind: str, dtype: torch.dtype) -> None:
    x = draw(5, 40, 24, dtype=dtype)
    codes, scale = quantize_kv(x, kind)
    assert codes.shape == (5, 40, 12 if kind == "int4" else 24)
    assert (scale.dtype, scale.shape) == (torch.float32, (5, 40))
    assert codes[0, 0].nbytes + scale[0, 0].nbytes == vector_bytes(kind, 24)
    y = dequantize_kv(codes, scale, kind, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, specified(x, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_operator_is_quantize_then_dequantize(kind: str, dtype: torch.dtype) -> None:
    for x in (draw(5, 40, 24, dtype=dtype), draw(2, 7, 3, 16, dtype=dtype).transpose(1, 2)):
        assert torch.equal(fake_quantize_kv(x, kind), dequantize_kv(*quantize_kv(x, kind), kind, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_depends_on_itself_only(kind: str) -> None:
    """So a page, a chunk or a batch cannot matter."""
    x = draw(4, 30, 24)
    whole = fake_quantize_kv(x, kind)
    for i in range(4):
        assert torch.equal(fake_quantize_kv(x[i, 3:4], kind), whole[i, 3:4])


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_element_keeps_its_value_and_lies_far_from_any_other_code(kind: str) -> None:
    """With compressed-tensors' absmax / 127.5 it would lie between two codes, and a last bit would decide."""
    x = draw(64, 40, 24)[:, 1:]
    place = x.abs().argmax(-1, keepdim=True)
    largest = x.gather(-1, place)
    torch.testing.assert_close(fake_quantize_kv(x, kind).gather(-1, place), largest, rtol=3e-7, atol=0)
    for nudged in (torch.nextafter(x, torch.zeros(())), torch.nextafter(x, 2 * x)):
        again = fake_quantize_kv(nudged, kind).gather(-1, place)
        torch.testing.assert_close(again, largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_stays_alone(kind: str, bad: float) -> None:
    """A request whose logits are not finite ends; quantization must neither hide it nor spread it."""
    x = draw(3, 8, 24)
    expected = fake_quantize_kv(x, kind)
    x[1, 5, 7] = bad
    y = fake_quantize_kv(x, kind)
    assert not torch.isfinite(y[1, 5]).any()
    y[1, 5], expected[1, 5] = 0, 0
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_vectors(kind: str) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    x = torch.tensor([[smallest, 0.0, -smallest, 3 * smallest]])
    y = fake_quantize_kv(x, kind)
    assert torch.isfinite(y).all()
    assert (y - x).abs().max() <= 2 * smallest
    assert torch.equal(fake_quantize_kv(torch.zeros(2, 4), kind), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str) -> None:
    x = draw(5, 40, 24)
    compiled = torch.compile(lambda x: fake_quantize_kv(x * 2, kind) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), fake_quantize_kv(x * 2, kind) + 1)
    torch.library.opcheck(fake_quantize_kv, (draw(2, 5, 3, 16).transpose(1, 2), kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_rounds_as_a_cpu_does_eager_and_compiled(kind: str, dtype: torch.dtype) -> None:
    """Scales too, to the last bit: what one device trained, another one serves."""
    x = draw(50, 400, 64, dtype=dtype)
    for ours, theirs in zip(quantize_kv(x, kind), quantize_kv(x.cuda(), kind), strict=True):
        assert torch.equal(ours, theirs.cpu())
    compiled = torch.compile(lambda x: fake_quantize_kv(x, kind))
    for run in (fake_quantize_kv, lambda x, _: compiled(x)):
        assert torch.equal(run(x.cuda(), kind).cpu(), fake_quantize_kv(x, kind))


def test_fp8_is_what_compressed_tensors_makes_of_the_scheme_in_the_file() -> None:
    """One group of head_dim elements: its scale for each token and head is absmax / 448, as ours."""
    from qat.formats.compressed_tensors import kv_args

    args = QuantizationArgs(**kv_args(KINDS["fp8"], 24))
    x = draw(2, 3, 40, 24)[..., 1:, :]
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    assert scale.shape == (2, 3, 39, 1)
    assert torch.equal(fake_quantize(x, scale, zero, args), fake_quantize_kv(x, "fp8"))
