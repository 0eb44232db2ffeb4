"""QATEmbedding: its rows are those of the dequantized table, and so are its gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import scheme
from tiny_grids import OTHERS, bits
from torch import nn

from qat.kernels.fake_quant import watch
from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import LSQ, SEQ, Clipped, EfficientQAT, LSQPlus
from qat.nn.fake_quantize import FakeQuantize, Phase, kept
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import Codebook, IntGrid
from qat.numerics.scheme import Scheme

IDS = torch.tensor([[3, 0, 3], [11, 5, 3]])
SCHEMES = {
    "int4_g32": scheme(),
    "int4_g32_asym": scheme(symmetric=False),
    "int8_channel": Scheme(IntGrid(8), PerChannel()),
    "int8_tensor": Scheme(IntGrid(8), PerTensor()),
    "nvfp4": OTHERS["nvfp4"],
    "seq2": Scheme(Codebook("seq2"), PerGroup(16)),
}


def make(s=None, estimator=None, padding_idx=None, strength=1.0):
    torch.manual_seed(0)
    table = nn.Embedding(12, 64, padding_idx)
    quant = FakeQuantize(s or scheme(), (12, 64), MinMax(), estimator or LSQ(), torch.bfloat16, "e")
    quant.observe(table.weight)
    quant.phase, quant.strength = Phase.LEARN, strength
    with torch.no_grad():
        for parameter in quant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return QATEmbedding.from_float(table, quant)


@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_rows_are_those_of_the_quantized_table_bit_for_bit(s):
    embedding = make(s)
    quant = embedding.weight_fake_quant
    expected = quant(embedding.weight, torch.float32)[IDS]
    assert embedding(IDS).shape == (2, 3, 64)
    assert torch.equal(bits(embedding(IDS)), bits(expected))
    assert torch.equal(embedding(IDS[0, 0]), expected[0, 0])
    with kept(embedding):
        assert torch.equal(embedding(IDS), expected)


def test_under_autocast_rows_keep_the_masters_dtype_and_a_tied_head_has_its_own():
    embedding = make()
    table = nn.Linear(64, 12, bias=False)
    table.weight = embedding.weight
    head = QATLinear.from_float(table, embedding.weight_fake_quant)
    seen = []
    with torch.autocast("cpu", torch.bfloat16), watch(lambda scale, result, rows: seen.append((scale, result.dtype))):
        rows = embedding(IDS)
        assert rows.dtype == F.embedding(IDS, embedding.weight).dtype == torch.float32
        head(rows)
    assert [dtype for _, dtype in seen] == [torch.float32, torch.bfloat16]
    assert all(scale.data_ptr() == embedding.weight_fake_quant.scale.data_ptr() for scale, _ in seen)


def test_only_the_rows_that_are_looked_up_are_computed():
    seen = []
    with watch(lambda x, result, rows: seen.append((tuple(result.shape), rows.tolist()))):
        make()(IDS)
    assert seen == [((6, 64), IDS.flatten().tolist())]


ESTIMATORS = [
    ("int4_g32", LSQ()),
    ("int8_channel", LSQ()),
    ("int8_tensor", LSQ()),
    ("int4_g32_asym", LSQPlus()),
    ("int4_g32_asym", EfficientQAT()),
    ("int4_g32", Clipped()),
    ("nvfp4", LSQ()),
    ("seq2", SEQ()),
]


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize(("name", "estimator"), ESTIMATORS, ids=str)
def test_gradients_are_those_through_the_whole_table(name, estimator, strength):
    """Of weight, scales and zero points; a row that comes up thrice has the sum of three."""
    embedding = make(SCHEMES[name], estimator, strength=strength)
    grad = torch.randn(2, 3, 64)
    parameters = [p for p in embedding.parameters() if p.requires_grad]
    found = torch.autograd.grad(embedding(IDS), parameters, grad)
    whole = F.embedding(IDS, embedding.weight_fake_quant(embedding.weight, torch.float32))
    expected = torch.autograd.grad(whole, parameters, grad)
    assert len(found) == 1 + int(estimator.learns_scale) + int(estimator.learns_zero)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert bool(b.any())


def test_a_tied_pair_adds_its_gradients_up():
    embedding = make()
    table = nn.Linear(64, 12, bias=False)
    table.weight = embedding.weight
    head = QATLinear.from_float(table, embedding.weight_fake_quant)
    x = torch.randn(4, 64)
    parameters = [embedding.weight, embedding.weight_fake_quant.log_step]
    apart = [torch.autograd.grad(y.square().sum(), parameters) for y in (embedding(IDS), head(x))]
    together = torch.autograd.grad(embedding(IDS).square().sum() + head(x).square().sum(), parameters)
    for a, b, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(both, a + b)


def test_the_padding_row_has_no_gradient():
    plain, padded = make(), make(padding_idx=3)
    padded.weight.data.copy_(plain.weight.data)
    padded.weight_fake_quant.load_state_dict(plain.weight_fake_quant.state_dict())
    assert torch.equal(plain(IDS), padded(IDS))
    for name in ("weight", "weight_fake_quant.log_step"):
        parameters = [m.get_parameter(name) for m in (plain, padded)]
        full, found = (
            torch.autograd.grad(m(IDS).square().sum(), p)[0] for m, p in zip((plain, padded), parameters, strict=True)
        )
        assert bool(full[3].any())
        assert not bool(found[3].any())
        assert torch.equal(found[[0, 5, 11]], full[[0, 5, 11]])


def test_a_frozen_table_trains_its_scales_alone():
    embedding = make()
    embedding.weight.requires_grad_(False)
    embedding(IDS).square().sum().backward()
    assert embedding.weight.grad is None
    touched = embedding.weight_fake_quant.log_step.grad.any(-1)
    assert touched.nonzero().flatten().tolist() == [0, 3, 5, 11]


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_switched_off_it_is_nn_embedding_for_ten_optimizer_steps_bit_for_bit(padding_idx):
    quantized = make(padding_idx=padding_idx)
    quantized.weight_fake_quant.phase = Phase.OFF
    plain = nn.Embedding(12, 64, padding_idx)
    plain.weight = copy.deepcopy(quantized.weight)
    optimizers = [torch.optim.AdamW([m.weight], lr=1e-2) for m in (plain, quantized)]
    for _ in range(10):
        for module, optimizer in zip((plain, quantized), optimizers, strict=True):
            optimizer.zero_grad()
            module(IDS).square().mean().backward()
            optimizer.step()
        assert torch.equal(plain.weight, quantized.weight)


@pytest.mark.parametrize("bad", [-1, 12])
def test_an_id_beyond_the_table_is_an_error_as_it_is_without_quantization(bad):
    with pytest.raises(IndexError):
        make()(torch.tensor([bad]))
    with pytest.raises(IndexError):
        nn.Embedding(12, 64)(torch.tensor([bad]))


def test_compiled_it_is_eager():
    embedding = make(padding_idx=3)
    found = torch.compile(embedding, backend="aot_eager", fullgraph=True)(IDS)
    assert torch.equal(found, embedding(IDS))
    expected = torch.autograd.grad(embedding(IDS).square().sum(), embedding.weight)
    assert torch.equal(torch.autograd.grad(found.square().sum(), embedding.weight)[0], expected[0])
    torch._dynamo.reset()
