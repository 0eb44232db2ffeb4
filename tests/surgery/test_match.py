import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.numerics.granularity import PerGroup, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.match import match

TOKEN = Scheme(IntGrid(8), PerToken(), dynamic=True)


def rules(**kwargs):
    return Recipe({key: Rule(*value) for key, value in kwargs.items()})


def test_the_plan_says_what_and_why_not():
    plan = match(tiny(), recipe())
    assert len(plan.quantized) == 14
    rest = {row.name: row.reason for row in plan.rows if row.weight is None}
    assert rest == {"model.embed_tokens": "no rule matches", "lm_head": "tied to model.embed_tokens"}
    text = str(plan)
    assert "int4_g32" in text
    assert "no rule matches" in text
    assert "bits per weight" in text


def test_bits_per_weight_count_everything():
    model, plan = tiny(), match(tiny(), recipe(3))
    quantized = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    rest = sum(p.numel() for p in model.parameters()) - quantized
    expected = (quantized * (3 + 16 / 32) + rest * 16) / (quantized + rest)
    assert plan.bits_per_weight() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (rules(a=(".*_proj", scheme()), b=("nothing", scheme())), "recipe.rules.b: match='nothing' matches no module"),
        (rules(a=(".*_proj", Scheme(IntGrid(4), PerGroup(48)))), r"model\.layers\.0\.self_attn\.q_proj: group_size=48"),
        (
            rules(a=(".*_proj", scheme()), h=("lm_head", scheme())),
            "lm_head: its weight is tied to model.embed_tokens, which .* Let a rule match model.embed_tok",
        ),
        (
            rules(e=(".*embed_tokens", scheme(8)), h=("lm_head", scheme(4))),
            "lm_head: .* rule e quantizes as int8_g32_signed, but rule h says int4_g32_signed; they share their codes. "
            "Give both one",
        ),
        (rules(e=(".*embed_tokens", Scheme(IntGrid(8), PerGroup(48)))), "model.embed_tokens: group_size=48 does not"),
        (
            rules(e=(".*embed_tokens", scheme(), TOKEN)),
            "model.embed_tokens: rule e has an input scheme, but the input of an embedding is token ids",
        ),
        (rules(a=(".*_proj", None)), "the recipe quantizes no module"),
        (rules(), "the recipe quantizes no module"),
    ],
)
def test_what_does_not_fit_names_module_and_fix(recipe, message):
    with pytest.raises(ValueError, match=message):
        match(tiny(), recipe)


@pytest.mark.parametrize("head", [None, scheme(8)])
def test_a_tied_head_follows_its_embedding_and_is_counted_once(head):
    model = tiny()
    plan = match(model, rules(a=(".*_proj", scheme()), e=(".*embed_tokens", scheme(8)), h=("lm_head", head)))
    assert plan.quantized["model.embed_tokens"] == scheme(8)
    assert "lm_head" not in plan.quantized
    row = next(row for row in plan.rows if row.name == "lm_head")
    assert (row.shares, row.reason) == ("model.embed_tokens", "tied to model.embed_tokens, shares its codes")
    assert "tied to model.embed_tokens, shares its codes" in str(plan)
    linears = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    table = model.lm_head.weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - linears - table
    bits = linears * (4 + 16 / 32) + table * (8 + 16 / 32) + rest * 16
    assert plan.bits_per_weight() == pytest.approx(bits / (linears + table + rest))


def test_a_tied_head_may_have_quantized_inputs_of_its_own():
    plan = match(tiny(), rules(e=(".*embed_tokens", scheme(8)), h=("lm_head", scheme(8), TOKEN)))
    row = next(row for row in plan.rows if row.name == "lm_head")
    assert (row.shares, row.weight, row.input) == ("model.embed_tokens", None, TOKEN)
    assert "shared, input int8_token_dynamic" in str(plan)


def test_an_embedding_and_an_untied_head_have_schemes_of_their_own():
    plan = match(tiny(tied=False), rules(e=(".*embed_tokens", scheme(8)), h=("lm_head", scheme(4))))
    assert plan.quantized == {"model.embed_tokens": scheme(8), "lm_head": scheme(4)}


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.nn.Embedding(8, 32, max_norm=1.0), "embed: an embedding with max_norm=1.0 cannot be quantized"),
        (torch.nn.Embedding(8, 32, sparse=True), "embed: an embedding with sparse=True cannot be quantized"),
        (type("Scaled", (torch.nn.Embedding,), {})(8, 32), "embed: rule a would quantize a Scaled; only"),
    ],
)
def test_embeddings_that_do_more_than_look_up_are_refused(embedding, message):
    model = torch.nn.ModuleDict({"embed": embedding})
    with pytest.raises(ValueError, match=message):
        match(model, rules(a=("embed", scheme())))


def test_an_embedding_that_is_tied_to_another_is_refused():
    model = torch.nn.ModuleDict({"a_embed": torch.nn.Embedding(8, 32), "b_embed": torch.nn.Embedding(8, 32)})
    model["b_embed"].weight = model["a_embed"].weight
    with pytest.raises(ValueError, match="a_embed: its weight is tied to that of b_embed, a Embedding; only an embedd"):
        match(model, rules(a=("a_embed", scheme())))


def test_an_untied_head_may_be_quantized():
    plan = match(tiny(tied=False), rules(a=(".*_proj|lm_head", scheme())))
    assert "lm_head" in plan.quantized


def test_exceptions_come_last():
    plan = match(tiny(), rules(a=(".*_proj", scheme(4)), b=(r".*layers\.1.*down_proj", scheme(8))))
    bits = {name: s.grid.bits for name, s in plan.quantized.items()}
    assert bits["model.layers.0.mlp.down_proj"] == 4
    assert bits["model.layers.1.mlp.down_proj"] == 8


def test_matrices_that_are_no_linear_are_named():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_proj = torch.nn.Conv1d(4, 4, 1)

    with pytest.raises(ValueError, match=r"conv_proj: rule a would quantize a Conv1d; only nn\.Linear"):
        match(Odd(), rules(a=("conv_proj", scheme())))
