"""The evidence is real: it sees compiled and autocast graphs, and one weight that differs is a failure."""

import pytest
import torch
from tiny import embedded, recipe, tiny

from qat.nn.adapter import LoRA
from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.lora import LowRank
from qat.nn.observers.minmax import MinMax
from qat.numerics.qtensor import QuantizedTensor
from qat.surgery.adapt import add_lora
from qat.surgery.convert import apply, convert
from qat.surgery.prepare import fake_quants, prepare
from qat.training.certify import certify, filled
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule
from qat.training.split import compiled_blocks

ADAPTER = LoRA(rank=4, alpha=8.0)
PROMPTS = [torch.tensor([[5, 9, 200]]), torch.tensor([[7, 7]])]


def module(symmetric=True, schedule=None, estimator=None, rules=None, tied=True, adapter=None, layers=2, **kwargs):
    student = tiny(layers, tied=tied)
    student.model.layers[-1].mlp.up_proj.weight.data.div_(64)  # an ulp of its scales is below 1e-3
    prepare(
        student,
        rules or recipe(3, symmetric=symmetric),
        MinMax(),
        estimator or LSQ(),
        train_embeddings=rules is not None,
    )
    if adapter is not None:
        add_lora(student, adapter)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return QATModule(student, tiny(), Loss(), schedule or PhaseSchedule(), Optim(), 4, **kwargs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["plain", "lora"])
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_every_weight_is_seen_and_equal(symmetric, adapter, precision, dtype):
    trained = module(symmetric, adapter=adapter)
    tensors, folded, captured = certify(trained, PROMPTS, precision)
    assert captured == {"modules": 14, "equal": 14, "dtype": dtype}
    served = apply(tiny(), tensors, folded)
    assert torch.equal(served(input_ids=PROMPTS[0]).logits, trained.student(input_ids=PROMPTS[0]).logits)


@pytest.mark.parametrize(("tied", "uses"), [(True, 16), (False, 15)])
def test_both_uses_of_a_quantized_embedding_are_seen_each_in_its_dtype(tied, uses):
    trained = module(rules=embedded(), tied=tied)
    for precision, dtype in (("32-true", "float32"), ("bf16-mixed", "bfloat16, float32")):
        tensors, _, captured = certify(trained, PROMPTS, precision)
        assert captured == {"modules": uses, "equal": uses, "dtype": dtype}
        assert len(tensors) == 15


@pytest.mark.parametrize(("tied", "row"), [(False, 9), (True, 100)])
def test_one_code_of_a_table_is_found_by_whoever_uses_it(monkeypatch, tied, row):
    """Token 9 is looked up, and nothing else uses it; row 100 is not, but the tied head multiplies by it."""
    trained = module(rules=embedded(), tied=tied)

    def forged(student):
        tensors, folded = convert(student)
        tensors["model.embed_tokens"].codes[row, 5] ^= 1
        return tensors, folded

    monkeypatch.setattr("qat.training.certify.convert", forged)
    with pytest.raises(AssertionError, match=r"model\.embed_tokens: training computed with other weights"):
        certify(trained, PROMPTS, "32-true")


@pytest.mark.parametrize(
    ("name", "message"), [("model.embed_tokens", "look anything up in it"), ("lm_head", "compute with it")]
)
def test_one_of_two_uses_that_training_bypasses_is_found(name, message):
    trained = module(rules=embedded())
    user = trained.student.get_submodule(name)
    weight = user.weight.detach()
    user.forward = (lambda ids: weight[ids]) if "embed" in name else (lambda x: x @ weight.T)
    with pytest.raises(AssertionError, match=rf"model\.embed_tokens: training does not {message}"):
        certify(trained, PROMPTS, "32-true")


@pytest.mark.whole
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["embedded", "lora"])
def test_a_compiled_graph_is_watched_too(adapter):
    """Linears, lookups and the tied head; and linears with an adapter."""
    trained = module(rules=None if adapter else embedded(), adapter=adapter, layers=1)
    trained.split.compiled = compiled_blocks(trained.student.base_model, "aot_eager")
    trained.student.train()
    trained.forward_student(PROMPTS[0])  # compiled before anybody watches
    assert certify(trained, PROMPTS, "32-true")[2]["equal"] == (7 if adapter else 9)
    torch._dynamo.reset()


def test_equal_numbers_of_other_bits_are_found(monkeypatch):
    """-0 for +0: equal as numbers, and not what is served, bit for bit."""
    trained = module()
    name = "model.layers.1.mlp.up_proj"
    dequantize = QuantizedTensor.dequantize

    def signed(tensor, dtype):
        values = dequantize(tensor, dtype)
        return torch.where(values == 0, -torch.zeros_like(values), values)

    assert bool((convert(trained.student)[0][name].codes == 0).any())
    monkeypatch.setattr(QuantizedTensor, "dequantize", signed)
    with pytest.raises(AssertionError, match="training computed with other weights"):
        certify(trained, PROMPTS, "32-true")


def test_prompts_fill_a_batch_of_trainings_shape():
    assert filled(PROMPTS, (2, 4)).tolist() == [[5, 9, 200, 7], [7, 5, 9, 200]]
    assert filled(PROMPTS, (1, 2)).tolist() == [[5, 9]]
    assert certify(module(), PROMPTS, "32-true", (2, 4))[2]["equal"] == 14


def test_training_with_other_weights_is_found(monkeypatch):
    """One code of one linear differs by one between what trains and what is converted."""
    trained = module()

    def forged(student):
        tensors, folded = convert(student)
        tensors["model.layers.1.mlp.up_proj"].codes[3, 5] ^= 1
        return tensors, folded

    monkeypatch.setattr("qat.training.certify.convert", forged)
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.mlp\.up_proj: training computed with other weights"):
        certify(trained, PROMPTS, "32-true")


@pytest.mark.parametrize("way", ["not merged", "in bf16"])
def test_adapters_merged_in_another_way_are_found(monkeypatch, way):
    """As others do it: the adapter left beside the rounded weight, or merged in the dtype of the matmul."""
    trained = module(adapter=ADAPTER)

    def merged(self, weight):
        return weight + self.scaling * (self.B.bfloat16() @ self.A.bfloat16()).float() * (way == "in bf16")

    def forged(student):
        with monkeypatch.context() as patch:
            patch.setattr(LowRank, "merged", merged)
            return convert(student)

    monkeypatch.setattr("qat.training.certify.convert", forged)
    with pytest.raises(AssertionError, match=r"_proj: training computed with other weights"):
        certify(trained, PROMPTS, "bf16-mixed")


def test_a_linear_that_training_bypasses_is_found():
    trained = module()
    block = trained.student.model.layers[0].mlp
    block.forward = lambda x: block.down_proj(x.new_zeros(*x.shape[:-1], 128))  # gate and up never run
    with pytest.raises(AssertionError, match="training does not compute with it"):
        certify(trained, PROMPTS, "32-true")


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["plain", "lora"])
def test_scales_that_still_follow_are_taken_from_the_final_weights(adapter):
    trained = module(schedule=PhaseSchedule(0, 100), estimator=StraightThrough(), adapter=adapter)
    tensors, _, captured = certify(trained, PROMPTS, "32-true")
    assert captured["equal"] == 14
    for name, linear in fake_quants(trained.student).items():
        scale = MinMax().qparams(linear.master(), tensors[name].scheme, torch.bfloat16)[0]
        assert torch.equal(tensors[name].scale, scale)


def test_one_scale_off_by_one_ulp_is_found(monkeypatch):
    """Bits, not closeness: the weights differ by less than any sensible tolerance."""
    trained = module()
    name = "model.layers.1.mlp.up_proj"

    def forged(student):
        tensors, folded = convert(student)
        before = tensors[name].dequantize(torch.float32)
        group = int(tensors[name].codes[3, :32].count_nonzero() == 0)  # a group whose codes are not all zero
        tensors[name].scale[3, group].view(torch.int16).add_(1)
        assert 0 < float((tensors[name].dequantize(torch.float32) - before).abs().max()) < 1e-3
        return tensors, folded

    monkeypatch.setattr("qat.training.certify.convert", forged)
    with pytest.raises(AssertionError, match=rf"{name}: training computed with other weights"):
        certify(trained, PROMPTS, "32-true")


def test_the_graph_is_certified_in_training_mode():
    """A block that takes another way in training is certified on that way, whatever mode the module comes in."""
    trained = module()
    block = trained.student.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda x: forward(x) if not block.training else block.down_proj(x.new_zeros(*x.shape[:-1], 128))
    trained.student.eval()
    with pytest.raises(AssertionError, match="training does not compute with it"):
        certify(trained, PROMPTS, "32-true")
