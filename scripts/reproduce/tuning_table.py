"""What was tried, as Markdown, from the JSON that `quality.py --tune` adds to: by recipe and arm, what its settings
differ in, and what validation says of them.

    python scripts/reproduce/tuning_table.py scripts/results/tuning.json
"""

import argparse
import re
from pathlib import Path

from quality_table import markdown
from results import Row, read

FOLLOW = ("trainer.checkpoint_every", "trainer.val_every")  # max_steps, in each cell


def words(settings: str) -> dict[str, str]:
    """Settings by name, the last word of each; what the recipe says follows them and is left out."""
    return dict(word.split("=", 1) for word in re.split(r" (?=\+?[\w.@]+=)", settings.split(" {")[0]))


def tried(rows: list[Row], settings: dict[str, str]) -> list[tuple[Row, dict[str, str]]]:
    """Each row with those settings that differ among the rows of its recipe and arm, the best row first."""
    found = []
    for cell in dict.fromkeys((row["recipe"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["recipe"], row["arm"]) == cell]
        said = [words(settings[row["settings"]]) for row in mine]
        names = [name for name in dict.fromkeys(name for one in said for name in one) if name not in FOLLOW]
        differ = [name for name in names if len({one.get(name) for one in said}) > 1]
        pairs = [(row, {n: one[n] for n in differ if n in one}) for row, one in zip(mine, said, strict=True)]
        found += sorted(pairs, key=lambda pair: pair[0]["kl_validation"])
    return found


def table(content: Row) -> str:
    """All of them; KL and nll are on validation."""
    lines = [
        [f"`{row['recipe']}`", f"`{row['arm']}`", str(row["seed"]), " ".join(f"`{k}={v}`" for k, v in own.items()),
         f"{row['kl_validation']:.4f}", f"{row['nll_validation']:.4f}", f"{row['minutes']:.1f}"]
        for row, own in tried(content["rows"], content["meta"]["settings"])
    ]  # fmt: skip
    return markdown(["recipe", "arm", "seed", "settings", "KL", "nll", "minutes"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="rows of quality.py --tune")
    given = parser.parse_args()
    print(f"<!-- from: {given.file} -->\n{table(read(given.file))}")
