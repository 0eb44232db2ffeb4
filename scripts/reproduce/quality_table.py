"""The quality table as Markdown, from its JSON; means and spreads over seeds are written into it, under `summary`.

    python scripts/reproduce/quality_table.py scripts/results/quality.json [scripts/results/quality_ct.json]

With a second file its KL, of the same cells made otherwise, is set before that of the first, as its `beside`; its
`like` are rows that the first had, with the second's settings, of cells whose settings the table has changed since.
What is judged is the better of `qat` and `blockap_qat`, chosen by their KL on validation; all else is on test. Spreads
are standard deviations over seeds; `s.e.` is the standard error over windows of the test split (jackknife).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quality_plan import ARMS, DISTILLED, EVERYWHERE, RECIPES, candidates
from results import Row, read, write

from qat.evaluation.recovered import recovered

AIMS = {"w4a16_g64": (0.97, 0.03), "w3a16_g64": (0.93, 0.12), "w2a16_g64": (0.88, 0.5)}  # recovered.nll, KL
TEXTS = ("generated", "web", "wives")
METRICS = ("ppl", "nll", "kl", "top1_agree", "nll_validation", "kl_validation", "bits_per_quantized_weight", "minutes",
           *(f"{metric}_{text}" for text in TEXTS for metric in ("ppl", "nll", "kl")))  # fmt: skip
Rows = dict[tuple[str, str, int], Row]


def spread(name: str, values: list[float | None]) -> Row:
    """Mean and spread of what is known, as two entries."""
    known = [value for value in values if value is not None]
    return {name: mean(known) if known else None, f"{name}_spread": stdev(known) if len(known) > 1 else None}


def of(rows: Rows, recipe: str, arm: str, seed: int) -> Row | None:
    """A cell for a seed; that of all seeds where it depends on none."""
    named = "-" if arm in EVERYWHERE else recipe
    return rows.get((named, arm, seed)) or rows.get((named, arm, 0))


def summary(rows: Rows) -> list[Row]:
    """A row for each recipe and arm: means and spreads over seeds."""
    found = []
    for recipe in ("-", *RECIPES):
        for arm in ARMS:
            mine = [row for (r, a, _), row in rows.items() if (r, a) == (recipe, arm)]
            if mine:
                one: Row = {"recipe": recipe, "arm": arm, "seeds": len(mine)}
                for metric in METRICS:
                    one |= spread(metric, [row[metric] for row in mine])
                if len({row["settings"] for row in mine}) > 1:
                    print(f"{recipe} {arm}: its seeds have different settings", file=sys.stderr)
                found.append(one)
    return found


def aims(rows: Rows, means: list[Row]) -> list[Row]:
    """A row for each recipe: what the chosen arm won back of what the best PTQ method lost."""
    found = []
    for recipe in RECIPES:
        both = [row for row in means if row["recipe"] == recipe and row["arm"] in DISTILLED]
        if not both:
            continue
        chosen = min(both, key=lambda row: row["kl_validation"])["arm"]
        each = _each(rows, recipe, chosen, "fp", candidates(recipe))
        if not each:
            continue
        nll, kl = AIMS.get(recipe, (None, None))
        one: Row = {"recipe": recipe, "chosen": chosen, "of": [row["arm"] for row in both], "seeds": len(each)}
        one |= {"aim_nll": nll, "aim_kl": kl, "best_nll": _winners(each, "nll"), "best_kl": _winners(each, "kl")}
        for key in ("kl", "recovered_nll", "recovered_kl", *(f"recovered_kl_{text}" for text in TEXTS)):
            one |= spread(key, [row[key] for row in each])
        others = _each(rows, recipe, chosen, "fp", tuple(arm for arm in candidates(recipe) if arm != "autoround"))
        for key in ("recovered_nll", "recovered_kl"):
            one |= spread(f"{key}_without_autoround", [row[key] for row in others])
        one["recovered_nll_se"] = mean(row["se"] for row in each)
        one["recovered_nll_without_autoround_se"] = mean(row["se"] for row in others)
        entropy = _each(rows, recipe, "qat_ce", "ft_fp", (*candidates(recipe), "ft_gptq"))
        one |= spread("ce_recovered_nll", [row["recovered_nll"] for row in entropy])
        found.append(one | {"ce_best_nll": _winners(entropy, "nll")})
    return found


def _each(rows: Rows, recipe: str, trained: str, reference: str, against: tuple[str, ...]) -> list[Row]:
    """What one trained arm recovered, for each seed of which everything is known."""
    found = []
    for seed in sorted({s for r, arm, s in rows if (r, arm) == (recipe, trained)}):
        arms = {arm: of(rows, recipe, arm, seed) for arm in (trained, reference, *against)}
        known: dict[str, Any] = {arm: row for arm, row in arms.items() if row}
        if len(known) < len(arms):
            continue
        best = recovered(known, list(against), trained, reference)["vs_best_ptq"]
        three = (known[best["nll"]["winner"]], known[trained], known[reference])
        one: Row = {"kl": known[trained]["kl"], "se": jackknife(*(row["windows"]["nll"] for row in three))}
        for metric in ("nll", "kl"):
            one |= {f"recovered_{metric}": best[metric]["value"], f"best_{metric}": best[metric]["winner"]}
        for text in TEXTS:
            lowest = min(known[arm][f"kl_{text}"] for arm in against)
            one[f"recovered_kl_{text}"] = 1 - known[trained][f"kl_{text}"] / lowest
        found.append(one)
    return found


def jackknife(ptq: list[float], trained: list[float], reference: list[float]) -> float:
    """Standard error of recovered nll over windows, by leaving out one at a time."""
    sums, count = [sum(arm) for arm in (ptq, trained, reference)], len(ptq)
    left = [
        [total - one for total, one in zip(sums, window, strict=True)]
        for window in zip(ptq, trained, reference, strict=True)
    ]
    values = [(p - t) / (p - f) for p, t, f in left]
    return math.sqrt((count - 1) / count * sum((value - mean(values)) ** 2 for value in values))


def _winners(each: list[Row], metric: str) -> str:
    return ", ".join(dict.fromkeys(row[f"best_{metric}"] for row in each))


def number(row: Row | None, key: str, digits: int) -> str:
    """A mean, with its spread where there is one."""
    if row is None or row[key] is None:
        return "—"
    some = row.get(f"{key}_spread")
    return f"{row[key]:.{digits}f}" + ("" if some is None else f" ± {some:.{digits}f}")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def matrix(means: list[Row], key: str, digits: int) -> str:
    """Recipes x arms."""
    by = {(row["recipe"], row["arm"]): row for row in means}
    lines = []
    for recipe in RECIPES:
        if any(named == recipe for named, _ in by):
            cells = [by.get(("-" if arm in EVERYWHERE else recipe, arm)) for arm in ARMS]
            lines.append([f"`{recipe}`", *(number(cell, key, digits) for cell in cells)])
    return markdown(["recipe", *(f"`{arm}`" for arm in ARMS)], lines)


def verdict(judged: list[Row]) -> str:
    """The aims, and what was reached."""
    lines = []
    for row in judged:
        nll, kl = ("—" if row[key] is None else f"{row[key]:g}" for key in ("aim_nll", "aim_kl"))
        lines.append([f"`{row['recipe']}`", f"`{row['chosen']}`",
                      number(row, "recovered_nll", 3), f"{row['recovered_nll_se']:.3f}", row["best_nll"],
                      number(row, "recovered_nll_without_autoround", 3),
                      f"{row['recovered_nll_without_autoround_se']:.3f}", nll, number(row, "kl", 4), kl,
                      number(row, "recovered_kl", 3), row["best_kl"],
                      *(number(row, f"recovered_kl_{text}", 3) for text in TEXTS),
                      number(row, "ce_recovered_nll", 3), row["ce_best_nll"] or "—"])  # fmt: skip
    header = ["recipe", "arm", "recovered nll", "s.e.", "against", "without AutoRound", "s.e.", "aim", "KL", "aim"]
    header += ["recovered KL", "against"]
    header += [f"recovered KL, {text}" for text in TEXTS]
    return markdown([*header, "`qat_ce`: recovered nll", "against"], lines)


def beside(means: list[Row], others: list[Row], like: Sequence[Row] = ()) -> list[Row]:
    """KL of the same cells made otherwise, as `first`, and KL as it is: means over seeds, of arms that quantize.

    Cells whose settings the table has changed since are compared with `like`, rows that have the others' settings.
    """
    found = []
    for row in means:
        first, then = ([r["kl"] for r in rows if (r["recipe"], r["arm"]) == (row["recipe"], row["arm"])]
                       for rows in (others, like))  # fmt: skip
        if first:
            kl = mean(then) if then else row["kl"]
            found.append({"recipe": row["recipe"], "arm": row["arm"], "first": mean(first), "kl": kl})
    return found


def beside_table(pairs: list[Row]) -> str:
    """Recipes x arms, as Markdown."""
    by = {(row["recipe"], row["arm"]): f"{row['first']:.4f} → {row['kl']:.4f}" for row in pairs}
    arms = [arm for arm in ARMS if any(arm == other for _, other in by)]
    recipes = [recipe for recipe in RECIPES if any(recipe == other for other, _ in by)]
    lines = [[f"`{recipe}`", *(by.get((recipe, arm), "—") for arm in arms)] for recipe in recipes]
    return markdown(["recipe", *(f"`{arm}`" for arm in arms)], lines)


def main(file: str, other: str | None = None) -> None:
    """Writes the summary and prints the tables."""
    content = read(Path(file))
    rows = {(row["recipe"], row["arm"], row["seed"]): row for row in content["rows"]}
    means = summary(rows)
    content |= {"summary": means, "aims": aims(rows, means)}
    write(Path(file), content)
    mark = f"<!-- from: {file} -->"
    print(f"The better of `qat` and `blockap_qat` on validation:\n\n{mark}\n{verdict(content['aims'])}\n")
    for key, title, digits in (
        ("kl", "KL, test", 4), ("ppl", "ppl, test", 3), ("top1_agree", "top-1 agreement, test", 3),
        ("kl_generated", "KL, generated", 4), ("ppl_generated", "ppl, generated", 3), ("kl_web", "KL, web", 4),
        ("kl_wives", "KL, wives", 4), ("kl_validation", "KL, validation", 4), ("minutes", "minutes", 1),
    ):  # fmt: skip
        print(f"{title}:\n\n{mark}\n{matrix(means, key, digits)}\n")
    if other is not None:
        content = read(Path(other))
        content["beside"] = beside(means, content["rows"], content.get("like", ()))
        write(Path(other), content)
        print(f"KL, test:\n\n<!-- from: {other} -->\n{beside_table(content['beside'])}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="rows of quality.py")
    parser.add_argument("other", nargs="?", help="rows of the same cells, made otherwise")
    main(**vars(parser.parse_args()))
