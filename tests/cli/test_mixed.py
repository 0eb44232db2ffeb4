import re

import yaml

from qat.cli.mixed import dump, mixed_recipe
from qat.numerics.recipe import Recipe, Rule

BLOCKS = "model.layers"
KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"{BLOCKS}.{i}.{kind}" for i in range(12) for kind in KINDS]
BASE = {
    "_target_": "qat.numerics.recipe.Recipe",
    "rules": {
        "linears": {"match": ".*_proj", "weight": {"grid": {"bits": 4}, "group_size": 64}, "input": {"grid": 8}},
        "lm_head": {"match": "lm_head", "weight": None},
    },
    "kv": {"grid": {"bits": 8}},
}


def rules(**exceptions):
    return dict.fromkeys(NAMES, "linears") | {"lm_head": "lm_head", "embed_tokens": None} | exceptions


def chosen(recipe, name):
    """The width that a recipe's config means for a module: that of the last rule that matches."""
    found = Recipe({key: Rule(rule["match"], None) for key, rule in recipe["rules"].items()}).rule_for(name)
    weight = recipe["rules"][found[0]]["weight"] if found else None
    return weight and weight["grid"]["bits"]


def check(widths, base=BASE, deciding=None):
    found = mixed_recipe(base, BLOCKS, widths, deciding or rules())
    assert {name: chosen(found, name) for name in widths} == widths
    assert chosen(found, "lm_head") is None
    assert base == yaml.safe_load(dump(base, "x"))
    return found


def test_every_module_gets_its_width():
    widths = {name: (2, 3, 4, 8)[hash(name) % 4] for name in NAMES}
    found = check(widths)
    assert list(found["rules"])[:2] == ["linears", "lm_head"]
    assert {k: v for k, v in found.items() if k != "rules"} == {k: v for k, v in BASE.items() if k != "rules"}
    for rule in list(found["rules"].values())[2:]:
        assert rule["weight"]["group_size"] == 64
        assert rule["input"] == {"grid": 8}


def test_one_width_for_all_needs_no_other_rule():
    found = check(dict.fromkeys(NAMES, 3))
    assert list(found["rules"]) == ["linears", "lm_head"]
    assert found["rules"]["linears"]["match"] == ".*_proj"
    assert BASE["rules"]["linears"]["weight"]["grid"]["bits"] == 4


def matches(recipe):
    return {key: rule["match"] for key, rule in recipe["rules"].items()}


def test_a_kind_is_one_rule():
    found = check({name: 3 if "down" in name else 4 for name in NAMES})
    assert matches(found) | {"linears_w3": r"model\.layers\.\d+\.mlp\.down_proj"} == matches(found)


def test_blocks_are_one_rule():
    found = check({name: 8 if re.search(r"\.(0|11)\.", name) else 4 for name in NAMES})
    expected = r"model\.layers\.(0|11)\.(self_attn\.q_proj|mlp\.up_proj|mlp\.down_proj)"
    assert matches(found)["linears_w8"] == expected
    assert len(found["rules"]) == 3


def test_a_rule_of_all_blocks_never_reaches_a_module_that_another_rule_decides_for():
    base = BASE | {"rules": BASE["rules"] | {"first": {"match": r".*\.0\..*", "weight": None}}}
    out = {f"{BLOCKS}.0.{kind}": "first" for kind in KINDS}
    widths = {name: 3 if "down" in name else 4 for name in NAMES if name not in out}
    found = check(widths, base, rules(**out))
    assert [chosen(found, name) for name in out] == [None] * 3
    assert "(1|2|3|" in matches(found)["linears_w3"]


def test_rules_of_several_schemes_keep_them():
    rows = {"match": r".*\.mlp\..*", "weight": {"grid": {"bits": 4}, "group_size": 32}}
    base = BASE | {"rules": BASE["rules"] | {"mlp": rows}}
    deciding = rules(**{name: "mlp" for name in NAMES if ".mlp." in name})
    found = check({name: 2 if ".3." in name else 4 for name in NAMES}, base, deciding)
    assert found["rules"]["linears_w2"]["weight"]["group_size"] == 64
    assert found["rules"]["mlp_w2"]["weight"]["group_size"] == 32


def test_names_that_are_taken_and_modules_outside_of_the_blocks():
    head = {"match": "lm_head", "weight": {"grid": {"bits": 8}, "group_size": 64}}
    base = BASE | {"rules": {"linears": BASE["rules"]["linears"] | {"match": ".*"}, "linears_w2": head}}
    deciding = dict.fromkeys(NAMES, "linears") | {"lm_head": "linears_w2"}
    widths = dict.fromkeys(NAMES, 4) | {NAMES[0]: 2, NAMES[4]: 2, "lm_head": 3}
    found = mixed_recipe(base, BLOCKS, widths, deciding)
    assert {name: chosen(found, name) for name in widths} == widths
    assert list(found["rules"]) == ["linears", "linears_w2", "linears_w2_2", "linears_w2_3"]


def test_the_file_says_what_it_is_and_reads_back():
    text = dump(BASE, "Two words.")
    assert text.startswith("# Two words.\n_target_: ")
    assert "grid: {bits: 4}" in text
