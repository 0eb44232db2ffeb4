"""What lies beside the tensors of an export for people and for other engines: recipe, serve files, model card.

`recipe.yaml` and `serve/` are written before the certificate is issued, which binds them. The card is written last,
since it quotes the certificate and numbers that are measured later; no loader reads it, so it may.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from qat.cli.mixed import dump
from qat.cli.serving import served
from qat.formats.targets import Layer
from qat.numerics.recipe import Recipe
from qat.report.launch import Launch, files

RECIPE, CARD = "recipe.yaml", "README.md"


def as_config(value: Any) -> Any:
    """A recipe, or what it is made of, as the node of a config that builds it."""
    if isinstance(value, dict):
        return {key: as_config(item) for key, item in value.items()}
    if not is_dataclass(value):
        return value
    target = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"_target_": target} | {f.name: as_config(getattr(value, f.name)) for f in fields(value) if f.init}


def launch(model: str, what: str, dtype: str, length: int) -> Launch:
    """How engines are started on a checkpoint.

    Args:
        model: Name of the base model, of which the last part is taken.
        what: What tells the checkpoint from others of it.
        dtype: Storage dtype.
        length: The model's context.
    """
    return Launch(re.sub(r"[^\w.-]+", "-", f"{Path(model).name}-{what}"), dtype, length)


def write_beside(path: Path, recipe: Recipe, name: str, layers: list[Layer], start: Launch) -> None:
    """Writes `recipe.yaml`, and `serve/` for the engines that nothing is known against.

    Args:
        path: The checkpoint's directory, written a moment ago and not certified yet.
        recipe: What the codes were found under.
        name: The format.
        layers: The linears as the file has them.
        start: What engines are told.
    """
    text = "What this checkpoint says of its codes: qat run recipe=recipe.yaml"
    (path / RECIPE).write_text(dump(as_config(recipe), text), encoding="utf-8")
    refused = served(name, layers, start.dtype, recipe.kv)
    for file, content in files(start, [engine for engine, reason in refused.items() if reason is None]).items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(content, encoding="utf-8")
