import pytest
from tiny import scheme

from qat.numerics.granularity import PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme


def test_the_last_matching_rule_wins():
    recipe = Recipe(
        {"all": Rule(".*", scheme(4)), "down": Rule(".*down_proj", scheme(8)), "head": Rule("lm_head", None)}
    )
    assert recipe.rule_for("model.layers.0.mlp.up_proj")[0] == "all"
    assert recipe.rule_for("model.layers.0.mlp.down_proj") == ("down", Rule(".*down_proj", scheme(8)))
    assert recipe.rule_for("lm_head")[1].weight is None


def test_a_rule_matches_whole_names_only():
    recipe = Recipe({"q": Rule("q_proj", scheme(4))})
    assert recipe.rule_for("layers.0.q_proj") is None
    assert recipe.rule_for("q_proj") is not None


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"match='\(' is not a regular expression"):
        Rule("(", scheme(4))
    with pytest.raises(ValueError, match="convention='signed' is for weights"):
        Rule("x", scheme(8), Scheme(IntGrid(8), PerTensor(), convention="signed"))
    with pytest.raises(ValueError, match="needs a weight scheme"):
        Rule("x", None, Scheme(IntGrid(8), PerToken(), dynamic=True))
