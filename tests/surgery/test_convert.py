import copy

import pytest
import torch
from tiny import embedded, recipe, scheme, tiny

from qat.nn.estimators import LSQ
from qat.nn.observers.mse import MSE
from qat.surgery.convert import apply, convert
from qat.surgery.prepare import fake_quants, prepare

IDS = torch.arange(24).view(2, 12)


def trained(symmetric=True, tied=True, embeddings=False, rules=None):
    """A prepared model whose every trainable parameter has moved."""
    student = tiny(tied=tied)
    prepare(student, rules or recipe(3, symmetric=symmetric), MSE(6), LSQ(), train_embeddings=embeddings)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return student.eval()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_codes_are_the_trained_weights_bit_for_bit(symmetric, dtype):
    student = trained(symmetric)
    tensors, _ = convert(student)
    for name, linear in fake_quants(student).items():
        assert torch.equal(tensors[name].dequantize(dtype), linear.weight_fake_quant(linear.weight, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tied", "embeddings"), [(True, False), (True, True), (False, True)])
def test_the_served_graph_is_the_trained_graph(symmetric, tied, embeddings):
    student = trained(symmetric, tied, embeddings)
    tensors, folded = convert(student)
    assert all(value.dtype == torch.bfloat16 for value in folded.values())
    assert ("model.embed_tokens.weight" in folded) is embeddings
    assert ("lm_head.weight" in folded) is not tied  # a table that is tied is stored once
    model = tiny(tied=tied)
    before = copy.deepcopy(model.state_dict())
    served = apply(model, tensors, folded)
    assert torch.equal(served(input_ids=IDS).logits, student(input_ids=IDS).logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("weight", [None, scheme(4, 32, False)])
@pytest.mark.parametrize(("tied", "embeddings"), [(True, False), (True, True), (False, False), (False, True)])
def test_the_served_graph_is_the_trained_graph_with_a_quantized_embedding(weight, tied, embeddings):
    """One table under the embedding's name; where both use it, both have its values."""
    student = trained(tied=tied, embeddings=embeddings, rules=embedded(weight))
    tensors, folded = convert(student)
    assert ("lm_head" in tensors, len(tensors)) == (False, 15)
    assert not [name for name in folded if "embed" in name or ("head" in name and tied)]
    table = tensors["model.embed_tokens"].dequantize(torch.float32)
    assert torch.equal(student.model.embed_tokens(IDS), table[IDS])
    served = apply(tiny(tied=tied), tensors, folded)
    assert torch.equal(served.model.embed_tokens.weight, table)
    assert (served.lm_head.weight is served.model.embed_tokens.weight) is tied
    assert torch.equal(served(input_ids=IDS).logits, student(input_ids=IDS).logits)


def test_an_applied_copy_shares_what_did_not_change():
    model = tiny()
    tensors, _ = convert(trained())
    served = apply(model, tensors, {})
    assert served.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert served.lm_head.weight is served.get_input_embeddings().weight
    assert served.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight


def test_divergence_is_named():
    student = trained()
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight_fake_quant.log_step[0, 0] = 1000.0
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*lower the learning rate"):
        convert(student)
    student = trained()
    with torch.no_grad():
        student.model.norm.parametrizations.weight.original[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.norm\.weight: not finite"):
        convert(student)


def test_tensors_that_do_not_fit_the_model_are_refused():
    tensors, _ = convert(trained())
    with pytest.raises(ValueError, match="but the model has"):
        apply(tiny(), {}, {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(AttributeError):
        apply(tiny(), {"model.nothing": next(iter(tensors.values()))}, {})
