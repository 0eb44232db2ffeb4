"""Keys and values on a grid inside of a Hugging Face model: what is rounded, what is not, and who sees it."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import tiny
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qat.kernels.kv_quant import fake_quantize_kv
from qat.nn.kv import _FakeQuantizeKV, check_kv, quantize_kv
from qat.numerics.granularity import PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.scheme import Scheme

IDS = torch.tensor([[5, 9, 200, 31, 77, 3], [1, 2, 3, 4, 5, 6]])


def quantized(kind: str) -> LlamaForCausalLM:
    model = tiny()
    quantize_kv(model, KINDS[kind])
    return model


def logits(model: LlamaForCausalLM, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS} | kwargs)).logits


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LlamaForCausalLM]:
    """A model with transformers' own eager attention, its keys and values rounded by a patch around it."""
    attend = modeling_llama.eager_attention_forward

    def make(kind: str) -> LlamaForCausalLM:
        def rounded(module, query, key, value, mask, **kwargs):
            return attend(module, query, fake_quantize_kv(key, kind), fake_quantize_kv(value, kind), mask, **kwargs)

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", rounded)
        model = tiny()
        model.set_attn_implementation("eager")
        return model

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]])
def test_it_is_attention_over_rounded_keys_and_values(eager: Callable, kind: str, padding: list | None) -> None:
    """With the masks that it would have without: causal, and of the padding."""
    mask = {} if padding is None else {"attention_mask": torch.tensor(padding)}
    seen = torch.ones_like(IDS, dtype=torch.bool) if padding is None else torch.tensor(padding).bool()
    found, expected, plain = logits(quantized(kind), **mask), logits(eager(kind), **mask), logits(tiny(), **mask)
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert (found - plain)[seen].abs().max() > 1e-2, "something was rounded"


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_seen(kind: str) -> None:
    other = IDS.clone()
    other[:, 4:] = 50
    model = quantized(kind)
    assert torch.equal(logits(model)[:, :4], logits(model, input_ids=other)[:, :4])
    assert not torch.equal(logits(model)[:, 4:], logits(model, input_ids=other)[:, 4:])


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_through_transformers_cache_is_the_same(kind: str) -> None:
    model = quantized(kind)
    with torch.no_grad():
        out = model(input_ids=IDS[:, :2], use_cache=True)
        rows = [out.logits]
        for t in range(2, IDS.shape[1]):
            out = model(input_ids=IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_straight_through(kind: str) -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    grad = torch.randn(2, 3, 16)
    y = _FakeQuantizeKV.apply(x, kind)
    assert torch.equal(y, fake_quantize_kv(x, kind))
    y.backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["int8"])
def test_compiled_equals_eager(kind: str) -> None:
    model = quantized(kind).train()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = []
    for run in (model, graph):
        model.zero_grad()
        y = run(input_ids=IDS, use_cache=False).logits
        y.square().mean().backward()
        outputs.append((y.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert outputs[0][1].abs().max() > 0


def test_copies_carry_it_and_the_original_does_not() -> None:
    model = tiny()
    before = logits(model)
    student = copy.deepcopy(model)
    quantize_kv(student, KINDS["int8"])
    assert student.config is not model.config
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(student), before)
    assert torch.equal(logits(copy.deepcopy(student)), logits(student))
    again = type(student)(student.config.from_dict(student.config.to_dict()))
    assert again.config._attn_implementation == "sdpa", "a saved config says nothing of it"


def test_twice_is_once_and_no_scheme_is_no_change() -> None:
    model = quantized("int4")
    before = logits(model)
    quantize_kv(model, KINDS["int4"])
    quantize_kv(model, None)
    assert torch.equal(logits(model), before)
    plain = tiny()
    quantize_kv(plain, None)
    assert plain.config._attn_implementation == "sdpa"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"recipe.kv: granularity=PerTensor\(\)"):
        quantize_kv(tiny(), Scheme(IntGrid(8), PerTensor(), dynamic=True, convention="vllm"))
    odd, eager = tiny(), tiny()
    odd.config.head_dim = 15
    with pytest.raises(ValueError, match=r"recipe\.kv: int4 .* head_dim=15 is odd"):
        quantize_kv(odd, KINDS["int4"])
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"recipe\.kv: .* 'sdpa', but the model's is 'eager'"):
        quantize_kv(eager, KINDS["int8"])
    with pytest.raises(ValueError, match="but the model's is 'qat_kv_int8'"):
        check_kv(quantized("int8"), KINDS["fp8"])
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation_cached_value", False, raising=False)
    with pytest.raises(ValueError, match=r"recipe\.kv: the attention of LlamaForCausalLM does not go through"):
        quantize_kv(tiny(), KINDS["int8"])
