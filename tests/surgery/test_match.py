import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.match import match


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
        (rules(a=(".*", scheme())), "model.embed_tokens: rule a would quantize a Embedding"),
        (rules(a=(".*_proj", scheme()), h=("lm_head", scheme())), "lm_head: its weight is tied to model.embed_tokens"),
        (rules(a=(".*_proj", None)), "the recipe quantizes no module"),
        (rules(), "the recipe quantizes no module"),
    ],
)
def test_what_does_not_fit_names_module_and_fix(recipe, message):
    with pytest.raises(ValueError, match=message):
        match(tiny(), recipe)


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
