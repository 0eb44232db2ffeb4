"""Decoder and head apart give the model's own logits, whatever a family does between; or they are refused."""

import pytest
import torch
from tiny import recipe, tiny
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qat.nn.estimators import LSQ
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import prepare
from qat.training.split import SplitModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "gpt2": {"n_positions": 64},
}
IDS = torch.tensor([[5, 9, 20, 3, 7], [1, 2, 3, 4, 5]])


def family(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**(SIZES | FAMILIES.get(name, {}))))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_are_the_whole_model_bit_for_bit(name):
    model = family(name).eval()
    split = SplitModel(model)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(split.logits(split.hidden(IDS)), expected)
        head = model.get_output_embeddings()(split.hidden(IDS))
    assert torch.equal(head, expected) == (name not in ("gemma2", "granite", "cohere"))  # these do more than a head
    assert split.vocabulary == 64


def test_gradients_reach_decoder_and_head():
    model = tiny(tied=False)
    split = SplitModel(model)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    split.logits(split.hidden(IDS)).square().mean().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


def test_head_parameters_are_the_trained_ones():
    model = tiny(tied=False)
    assert SplitModel(model).head_parameters == [model.lm_head.weight]
    prepare(model, recipe(), MinMax(), LSQ())
    assert SplitModel(model).head_parameters == [model.lm_head.parametrizations.weight.original]
    tied = tiny()
    prepare(tied, recipe(), MinMax(), LSQ())
    assert SplitModel(tied).head_parameters == []


def test_the_model_is_left_as_it_is():
    model = tiny().train()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    split = SplitModel(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert dict(model.named_modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.eval()
    split.logits(split.hidden(IDS))
    assert not split._rest.training


class Peeks(LlamaForCausalLM):
    """Its logits depend on more than its decoder's output."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None] * 1e-3
        return output


class Whole(LlamaForCausalLM):
    base_model_prefix = "nothing"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Peeks(tiny().config), "^Peeks: its logits do not follow from .* recomputed from it, they differ"),
        (lambda: Whole(tiny().config), "^Whole: its logits do not follow from .*: it has none apart"),
        (lambda: family("opt"), "^OPTForCausalLM: its logits do not follow from .* no attribute 'decoder'"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_by_name(build, words):
    model = build().train()
    with pytest.raises(ValueError, match=words):
        SplitModel(model)
    assert model.training


def test_a_family_whose_attention_asks_for_its_name_keeps_its_masks():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon = FalconForCausalLM(FalconConfig(vocab_size=256, alibi=False, **sizes))
    split = SplitModel(falcon.eval())
    assert not split.windows
    expected = falcon(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(split.logits(split.hidden(IDS)), expected, atol=1e-5)
    assert SplitModel(tiny()).windows
