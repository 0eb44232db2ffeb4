"""fp32 is fp32, fp64 is fp64 all the way through; and only fp64 compares what is rounded on the way."""

import pytest
import torch
from tiny import recipe, tiny
from tiny_grids import RECIPES
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qat.evaluation.precision import compared_in, computing
from qat.evaluation.reference import decode
from qat.nn.estimators import LSQ
from qat.nn.kv import quantize_kv
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import Codebook
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme, integers
from qat.surgery.prepare import prepare

IDS = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))


def test_only_what_is_rounded_on_the_way_and_the_coarsest_weights_need_fp64() -> None:
    assert compared_in(recipe()) == compared_in(recipe(3)) == torch.float32
    assert compared_in(recipe(2)) == torch.float64
    assert {compared_in(recipe(kv=kind)) for kind in KINDS} == {torch.float64}
    assert compared_in(RECIPES["nvfp4a16"]) == torch.float32
    assert {compared_in(RECIPES[name]) for name in ("w8a8", "fp8_static", "nvfp4")} == {torch.float64}


@pytest.mark.parametrize("name", ["binary", "ternary", "seq2", "nf4"])
def test_a_file_says_the_same_as_the_codebook_that_it_holds(name: str) -> None:
    weight = Scheme(Codebook(name), PerGroup(32))
    assert compared_in(Recipe({"a": Rule(".*", weight)})) == compared_in(Recipe({"a": Rule(".*", integers(weight))}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_undone_afterwards(dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with computing(dtype):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.is_autocast_enabled("cpu")
                assert torch.zeros(1, dtype=torch.bfloat16).float().dtype == dtype
                assert torch.nn.Embedding(2, 3)(torch.tensor([1])).dtype == dtype
                assert torch.nn.Linear(2, 3)(torch.zeros(2)).dtype == dtype
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(KeyError), computing(dtype):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.zeros(1).to(torch.float32).float().dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision("highest")


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=256, num_hidden_layers=2, head_dim=16, **sizes)).eval()


def student() -> torch.nn.Module:
    model = tiny()
    prepare(model, recipe(kv="int8"), MinMax(), LSQ())
    return model.eval()


@pytest.mark.parametrize("make", [tiny, qwen3, student], ids=lambda f: f.__name__)
def test_fp64_reaches_every_operation(make) -> None:
    """A single one in fp32 would leave differences of 1e-8 between two ways to the same logits."""
    model = make()
    before = {name: p.dtype for name, p in model.named_parameters()}
    with computing(torch.float64), torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        out = model(input_ids=IDS[:, :7], use_cache=True)
        rows = [out.logits]
        for t in range(7, IDS.shape[1]):
            out = model(input_ids=IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits)
    assert whole.dtype == torch.float64
    assert float((torch.cat(rows, 1) - whole).abs().max() / whole.abs().max()) < 1e-13
    assert {name: p.dtype for name, p in model.named_parameters()} == before


def deep(kind: str | None) -> torch.nn.Module:
    """Deep enough for a last bit to grow."""
    model = tiny(layers=24)
    quantize_kv(model, None if kind is None else KINDS[kind])
    return model


def spread(model: torch.nn.Module, dtype: torch.dtype) -> float:
    """Largest relative difference of the logits, computed token by token and at once."""
    sequence = decode(model, IDS[0, :8], 20, dtype)
    with computing(dtype), torch.no_grad():
        whole: Tensor = model(input_ids=sequence.ids[None, :-1], use_cache=False).logits[0]
    return float((whole - sequence.logits).abs().max() / whole.abs().max())


def test_a_last_bit_decides_between_codes_in_fp32_and_none_in_fp64() -> None:
    """Why a quantized cache is compared in fp64: one graph differs from itself in fp32."""
    assert spread(deep(None), torch.float32) < 1e-5
    assert max(spread(deep(kind), torch.float32) for kind in KINDS) > 1e-4
    for kind in KINDS:
        assert spread(deep(kind), torch.float64) < 1e-6  # the sequence keeps fp32
