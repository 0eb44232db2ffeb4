"""A tiny model and prepared tokens as directories, and the command line that runs them in seconds."""

from pathlib import Path

from tiny import byte_tokenizer, tiny, tokens

SIZES = (
    "recipe.rules.linears.weight.granularity.group_size=32",
    "data.seq_len=32",
    "calibration={samples: 2, seq_len: 32, batch_size: 1, seed: 0}",
    "evaluation={windows: 4, seq_len: 32, batch_size: 2}",
)
STEPS = (
    *("trainer.max_steps=2", "trainer.batch_size=2", "trainer.checkpoint_every=1", "trainer.val_every=1"),
    *("trainer.val_windows=1", "observer.points=4"),
)
SURROUNDINGS = ("device=cpu", "logger=none", "generate.max_tokens=4", "model=hf", "model.name=tiny")


def material(root: Path) -> Path:
    """Writes `model/` (one layer, hidden 64, random) and `tokens/`."""
    tiny(layers=1).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    tokens(root / "tokens", train=2048, held_out=256)
    return root


def arguments(root: Path, verb: str, *more: str) -> list[str]:
    """`qat VERB` on what `material` wrote; `more` comes last and wins."""
    where = (f"model.path={root / 'model'}", f"data.path={root / 'tokens'}")
    steps = STEPS if verb in ("run", "train") else ()
    given = {text.partition("=")[0].lstrip("+") for text in more}
    if any(text.startswith("recipe=") and text.endswith(".yaml") for text in more):
        given.add("recipe.rules.linears.weight.granularity.group_size")  # a recipe of its own has its own sizes
    small = [text for text in (*SURROUNDINGS, *where, *SIZES, *steps) if text.partition("=")[0] not in given]
    return [verb, *small, *more]
