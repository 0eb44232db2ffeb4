"""Windows without padding need no mask: the same logits, and the model as it was afterwards."""

import pytest
import torch
from tiny import tiny
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, masking_utils

from qat.nn import windows
from qat.nn.kv import quantize_kv
from qat.nn.windows import whole_windows
from qat.numerics.kv import KINDS

IDS = torch.arange(1, 17).reshape(2, 8)


def sliding(size: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=size, **sizes)).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_logits_are_the_same_and_the_device_is_not_asked(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever traces, as a capture does, gets a dense mask from transformers: here none is built."""
    model = tiny()
    quantize_kv(model, None if kind is None else KINDS[kind])
    before, name = logits(model), model.config._attn_implementation
    with whole_windows(model):
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *args: True)
        monkeypatch.setattr(windows, "sdpa_mask", lambda **kwargs: pytest.fail("a mask is built"))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("size", [3, 7, 8, 9])
def test_a_model_that_looks_back_less_far_keeps_its_mask(size: int) -> None:
    model = sliding(size)
    before = logits(model)
    with whole_windows(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    if size < 8:
        assert not torch.allclose(before, logits(sliding(100))), "the window of the test is too wide to matter"


def test_other_attention_is_left_to_itself() -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    with whole_windows(model):
        assert model.config._attn_implementation == "eager"
        logits(model)


def test_the_name_comes_back_after_an_error() -> None:
    model = tiny()
    with pytest.raises(RuntimeError, match="halfway"), whole_windows(model):
        raise RuntimeError("halfway")
    assert model.config._attn_implementation == "sdpa"
