"""Dynamic inputs as one operator: the reference's numbers, eager and compiled, and which calls Triton takes."""

import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_grids import OTHERS, bits

from qat.kernels.fake_quant import fake_quantize, watch
from qat.nn.dynamic import LARGEST, _dynamic, fake_quantize_dynamic, fused_dynamic
from qat.nn.estimators import Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.interned import intern
from qat.nn.observers.ema import EMA
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.percentile import Percentile
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

SCHEMES = {
    "int8": OTHERS["int8_token_vllm"],
    "int8_asym": Scheme(IntGrid(8), PerToken(), symmetric=False, dynamic=True),
    "fp8": OTHERS["fp8_token"],
    **{name: replace(OTHERS[name], dynamic=True) for name in ("nvfp4", "mxfp4", "mxfp8")},
}


def expected(x, s, observer, dtype, g):
    scale, zero = observer.qparams(x, s, torch.float32, g)
    return (*fake_quantize(x, scale, s.grid, dtype, zero_point=zero, global_scale=g), zero)


@pytest.mark.parametrize("observer", [MinMax(), Percentile(90.0)], ids=str)
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_it_is_fake_quantization_on_what_the_observer_finds(s, observer):
    g = torch.full((1,), 30.0) if s.two_level else None
    for x in (torch.randn(2, 5, 64), torch.randn(7, 32).bfloat16()):
        found = fake_quantize_dynamic(x, intern(s), intern(observer), torch.bfloat16, global_scale=g)
        for ours, theirs in zip(found, expected(x, s, observer, torch.bfloat16, g), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def test_which_calls_triton_takes():
    int8, nvfp4 = SCHEMES["int8"], SCHEMES["nvfp4"]
    assert all(fused_dynamic(MinMax(), s, 576) for s in (int8, nvfp4, SCHEMES["fp8"], SCHEMES["mxfp8"]))
    assert not fused_dynamic(Percentile(), int8, 576)
    assert not fused_dynamic(EMA(), int8, 576)
    assert not fused_dynamic(MinMax(), SCHEMES["int8_asym"], 576)
    assert fused_dynamic(MinMax(), int8, LARGEST)
    assert not fused_dynamic(MinMax(), int8, LARGEST + 1)
    assert fused_dynamic(MinMax(), nvfp4, 16 * LARGEST)
    for granularity in (PerTensor(), PerChannel()):
        assert not fused_dynamic(MinMax(), Scheme(IntGrid(8), granularity, dynamic=True), 576)
    assert not fused_dynamic(MinMax(), Scheme(IntGrid(8), PerGroup(32), dynamic=True, scale_dtype="bfloat16"), 576)


@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_the_operator_is_well_formed(s):
    g = torch.ones(1) if s.two_level else None
    for strength in (None, torch.tensor(0.5)):
        arguments = (torch.randn(3, 4, 64), g, strength, intern(s), intern(MinMax()), torch.bfloat16)
        torch.library.opcheck(_dynamic, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_compiled_equals_eager_and_a_watcher_sees_both(s, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    quant = FakeQuantize(s, None, MinMax(), Clipped(), torch.bfloat16, "x", running=True)
    x, grad, found, seen = torch.randn(3, 5, 64), torch.randn(3, 5, 64), [], []
    quant(x, torch.float32)
    quant.phase = Phase.FROZEN
    torch._dynamo.reset()
    with watch(lambda scale, result, rows: seen.append(result)):
        for call in (quant, torch.compile(quant, backend=backend, fullgraph=True)):
            leaf = x.clone().requires_grad_()
            result = call(leaf, torch.float32)
            result.backward(grad)
            found.append((result, leaf.grad))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))
    assert len(seen) == 2
    torch._dynamo.reset()


def test_a_pickled_module_interns_its_names_again(monkeypatch):
    x = torch.randn(3, 64)
    quant = FakeQuantize(SCHEMES["int8"], None, MinMax(), Clipped(), torch.bfloat16, "x")
    before, stored = quant(x, torch.float32), pickle.dumps(quant)
    monkeypatch.setattr("qat.nn.interned._known", {})
    assert torch.equal(pickle.loads(stored)(x, torch.float32), before)
