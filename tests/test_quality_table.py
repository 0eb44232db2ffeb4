"""The quality table judges what validation chose, seed by seed, against the best PTQ method; the README shows it."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NLL = {"fp": 2.0, "ft_fp": 1.9, "rtn": 3.0, "mse_rtn": 2.8, "gptq": 2.5, "awq": 2.6, "autoround": 2.55, "ft_gptq": 2.3}
NLL |= {"qat": 2.1, "blockap_qat": 2.05, "qat_ce": 2.0}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import quality_table

    return quality_table


def cell(arm, seed, better=0.0):
    recipe, nll = "-" if arm in ("fp", "ft_fp") else "w4a16_g64", NLL[arm] - better
    found = {"recipe": recipe, "arm": arm, "seed": seed, "tokens": 20, "settings": "same", "minutes": 1.0}
    found |= {"top1_agree": 0.5, "bits_per_quantized_weight": 4.25, "windows": {"nll": [10 * nll, 10 * nll + 0.01]}}
    for end in ("", "_validation", "_generated", "_web", "_wives"):
        found |= {f"ppl{end}": 9.0, f"nll{end}": nll, f"kl{end}": nll - 1.5}
    return found


def rows(*extra):
    arms = [("fp", 0), ("rtn", 0), ("mse_rtn", 0)]
    arms += [(arm, seed) for arm in NLL if arm not in ("fp", "rtn", "mse_rtn") for seed in (1, 2)]
    cells = [cell(arm, seed, 0.1 * (seed == 2) * (arm == "blockap_qat")) for arm, seed in arms]
    return {(row["recipe"], row["arm"], row["seed"]): row for row in [*cells, *extra]}


def test_recovered_is_of_each_seed_against_the_best_ptq_and_qat_ce_against_the_fine_tuned(table):
    found = rows()
    (judged,) = table.aims(found, table.summary(found))
    assert (judged["chosen"], judged["seeds"], judged["best_nll"]) == ("blockap_qat", 2, "gptq")
    assert judged["recovered_nll"] == pytest.approx((0.45 / 0.5 + 0.55 / 0.5) / 2)
    assert judged["recovered_nll_spread"] == pytest.approx(0.2 / 2**0.5)
    assert judged["recovered_kl_web"] == pytest.approx(1 - (0.55 + 0.45) / 2 / 1.0)
    assert (judged["ce_best_nll"], judged["ce_recovered_nll"]) == ("ft_gptq", pytest.approx(0.3 / 0.4))


def test_without_autoround_where_that_is_best(table):
    found = rows()
    for seed in (1, 2):
        found["w4a16_g64", "autoround", seed]["nll"] = 2.2
        found["w4a16_g64", "autoround", seed]["windows"] = {"nll": [22.0, 22.0]}
    (judged,) = table.aims(found, table.summary(found))
    assert judged["best_nll"] == "autoround"
    assert judged["recovered_nll"] == pytest.approx((0.15 / 0.2 + 0.25 / 0.2) / 2)
    assert judged["recovered_nll_without_autoround"] == pytest.approx((0.45 / 0.5 + 0.55 / 0.5) / 2)


def test_the_standard_error_of_a_quotient_is_that_of_its_linear_part_where_windows_are_many(table):
    """Delta method, closed form: fp loses nothing, what is left over varies by window."""
    from random import Random
    from statistics import stdev

    draw = Random(0)
    ptq, left = [2.0 + draw.gauss(0, 0.02) for _ in range(400)], [0.5 + draw.gauss(0, 0.1) for _ in range(400)]
    found = table.jackknife(ptq, left, [0.0] * 400)
    ratio = sum(left) / sum(ptq)
    linear = [(one - ratio * whole) / (sum(ptq) / 400) for one, whole in zip(left, ptq, strict=True)]
    assert found == pytest.approx(stdev(linear) / 20, rel=1e-2)


def test_validation_chooses_not_test(table):
    found = rows()
    for seed in (1, 2):
        found["w4a16_g64", "qat", seed]["kl_validation"] = 0.1
    assert table.aims(found, table.summary(found))[0]["chosen"] == "qat"


def test_a_seed_that_lacks_a_ptq_method_is_not_judged(table):
    found = rows()
    del found["w4a16_g64", "awq", 2]
    assert table.aims(found, table.summary(found))[0]["seeds"] == 1


def test_what_is_printed_is_in_the_summary(table, tmp_path, capsys):
    from results import read, write

    file = tmp_path / "quality.json"
    write(file, {"meta": {}, "rows": list(rows().values())})
    table.main(str(file))
    printed = capsys.readouterr().out
    (means,) = [row for row in read(file)["summary"] if row["arm"] == "blockap_qat"]
    assert f"{means['kl']:.4f} ± {means['kl_spread']:.4f}" in printed
    table.main(str(file))
    assert capsys.readouterr().out == printed
    other = tmp_path / "other.json"  # as quality.py leaves it: no rows of another time beside it
    write(other, {"meta": {}, "rows": [row | {"kl": 2 * row["kl"]} for row in rows().values()]})
    table.main(str(file), str(other))
    assert capsys.readouterr().out.startswith(printed)
    assert all(pair["first"] == pytest.approx(2 * pair["kl"]) for pair in read(other)["beside"])


def test_the_readme_says_what_the_file_says_and_the_file_what_its_rows_say(table):
    """To the letter: the verdict, KL and perplexity."""
    content = json.loads((ROOT / "scripts/results/quality.json").read_text(encoding="utf-8"))
    found = {(row["recipe"], row["arm"], row["seed"]): row for row in content["rows"]}
    assert len(found) == len(content["rows"])
    means = table.summary(found)
    assert (content["summary"], content["aims"]) == (means, table.aims(found, means))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for shown in (table.verdict(content["aims"]), table.matrix(means, "kl", 4), table.matrix(means, "ppl", 3)):
        assert f"<!-- from: scripts/results/quality.json -->\n{shown}\n\n" in readme
    other = json.loads((ROOT / "scripts/results/quality_ct.json").read_text(encoding="utf-8"))
    assert other["beside"] == table.beside(means, other["rows"], other["like"])
    assert f"<!-- from: scripts/results/quality_ct.json -->\n{table.beside_table(other['beside'])}\n\n" in readme


def test_cells_made_otherwise_stand_before_those_as_they_are(table):
    means = [{"recipe": "w3a16_g64", "arm": arm, "kl": kl} for arm, kl in (("gptq", 0.25), ("qat", 0.125))]
    others = [{"recipe": "w3a16_g64", "arm": "gptq", "kl": kl} for kl in (0.5, 1.5)]
    found = table.beside(means, others)
    assert found == [{"recipe": "w3a16_g64", "arm": "gptq", "first": 1.0, "kl": 0.25}]
    assert table.beside_table(found).splitlines()[-1] == "| `w3a16_g64` | 1.0000 → 0.2500 |"
    like = [{"recipe": "w3a16_g64", "arm": "gptq", "kl": kl} for kl in (0.25, 0.75)]  # the others' settings, as it was
    assert table.beside(means, others, like) == [{"recipe": "w3a16_g64", "arm": "gptq", "first": 1.0, "kl": 0.5}]


def test_what_was_tried_is_told_apart_by_the_settings_that_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    import tuning_table

    settings = {
        "a": "x=1 lr=1 steps=2 trainer.val_every=2 lr=2 {...}",
        "b": "x=1 lr=3 steps=2 trainer.val_every=3 {...}",
    }
    settings["c"] = settings["a"].replace("lr=2", "lr=2 betas=[0.9, 0.99]")
    row = {"recipe": "w4a16_g64", "arm": "qat", "seed": 1, "nll_validation": 2.0, "minutes": 1.0}
    rows = [row | {"settings": sha, "kl_validation": kl} for sha, kl in (("a", 0.3), ("b", 0.1), ("c", 0.2))]
    rows += [rows[0] | {"recipe": "w2a16_g64", "settings": "b"}, rows[0] | {"arm": "gptq", "settings": "b"}]
    found = tuning_table.tried(rows, settings)
    assert [one["kl_validation"] for one, _ in found] == [0.1, 0.2, 0.3, 0.3, 0.3]
    assert [said for _, said in found] == [{"lr": "3"}, {"lr": "2", "betas": "[0.9, 0.99]"}, {"lr": "2"}, {}, {}]
    assert "| `lr=2` `betas=[0.9, 0.99]` | 0.2000 |" in tuning_table.table(
        {"rows": rows, "meta": {"settings": settings}}
    )
