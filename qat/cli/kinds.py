"""Kinds of values: what a config's default or a parameter's annotation says that a value may be."""

import ast
import json
from collections.abc import Iterable, Iterator
from typing import Any

WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "None": "null",
    "list": "a list",
    "dict": "a mapping",
}
LISTS = ("list", "tuple", "Sequence", "Iterable", "Collection", "set", "frozenset")
MAPPINGS = ("dict", "Mapping", "MutableMapping")
TEXTS = ("str", "Path", "PathLike")
BUILT = "built "  # marks the name of a class, of which a config holds a `_target_`


def describe(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str)
        return text if len(text) <= 60 else WORDS[type(value).__name__]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def is_open(value: Any) -> bool:
    """Whether nothing can be said of a value yet: `???`, or an interpolation that did not resolve."""
    return isinstance(value, str) and (value == "???" or "${" in value)


def misfit(defaults: Iterable[Any], value: Any) -> str | None:
    """What a value should be, if it is of another kind than all the defaults that the packaged configs give its key."""
    kinds = {kind(default) for default in defaults if not is_open(default)}
    if not kinds or kinds == {"None"} or is_open(value) or kind(value) in kinds:
        return None
    if kind(value) == "int" and "float" in kinds:
        return None
    return _expected([WORDS[kind] for kind in sorted(kinds)], value)


def mismatches(annotation: ast.expr, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Where a value is what a parameter's annotation excludes, and what it should be: the entry, if it is a mapping's.

    A name that starts with BUILT excludes all but a mapping with `_target_`; other unknown names exclude nothing.
    """
    if isinstance(annotation, ast.Subscript) and _last(annotation.value) in MAPPINGS and isinstance(value, dict):
        for key, item in value.items():
            yield from mismatches(_items(annotation.slice)[-1], item, f"{path}.{key}")
    elif not is_open(value) and not _fits(annotation, value):
        yield path, _expected(_words(annotation), value)


def kind(value: Any) -> str:
    """The word of a plain value's type."""
    return "None" if value is None else type(value).__name__


def _expected(words: list[str], value: Any) -> str:
    return f"expected {' or '.join(words)}, found {describe(value)}"


def _fits(node: ast.expr, value: Any) -> bool:
    if is_open(value):
        return True
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):  # a quoted annotation
            return _fits(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(op=ast.BitOr()):
            return _fits(node.left, value) or _fits(node.right, value)
        case ast.Subscript():
            return _fits_generic(_last(node.value), _items(node.slice), value)
        case _:
            return _fits_name(_last(node), value)


def _fits_generic(name: str, items: list[ast.expr], value: Any) -> bool:
    if name == "Optional":
        return value is None or _fits(items[0], value)
    if name == "Union":
        return any(_fits(item, value) for item in items)
    if name == "Literal":
        return value in [item.value for item in items if isinstance(item, ast.Constant)]
    if name == "Annotated":
        return _fits(items[0], value)
    if name in MAPPINGS:
        return isinstance(value, dict) and all(_fits(items[-1], item) for item in value.values())
    if _is_fixed(name, items):
        return isinstance(value, list) and len(value) == len(items) and all(map(_fits, items, value))
    if name in LISTS:
        return isinstance(value, list) and all(_fits(items[0], item) for item in value)
    return True


def _fits_name(name: str, value: Any) -> bool:
    if name == "bool":
        return isinstance(value, bool)
    if name in ("int", "float"):
        return isinstance(value, int if name == "int" else int | float) and not isinstance(value, bool)
    if name in TEXTS:
        return isinstance(value, str)
    if name.startswith(BUILT):
        return isinstance(value, dict) and "_target_" in value
    if name in LISTS:
        return isinstance(value, list)
    return isinstance(value, dict) if name in MAPPINGS else True


MAPPING = "a mapping with the _target_ of a "


def _words(node: ast.expr) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return _words(ast.parse(text, mode="eval").body)
        case ast.BinOp(op=ast.BitOr()):
            left, right = _words(node.left), _words(node.right)
            if left[-1].startswith(MAPPING) and right[0].startswith(MAPPING):  # said once, with all its targets
                right[0] = f"{left.pop()} or {right[0].removeprefix(MAPPING)}"
            return [*left, *right]
        case ast.Subscript():
            return _words_generic(_last(node.value), _items(node.slice))
        case ast.Name() | ast.Attribute() | ast.Constant():
            name = _last(node)
            if name.startswith(BUILT):
                return [MAPPING + name.removeprefix(BUILT)]
            return [WORDS.get("str" if name in TEXTS else name, name)]
        case _:
            return [ast.unparse(node)]


def _words_generic(name: str, items: list[ast.expr]) -> list[str]:
    if name == "Literal":
        return [describe(item.value) for item in items if isinstance(item, ast.Constant)]
    if name in ("Optional", "Union"):
        return [word for item in items for word in _words(item)] + ["null"] * (name == "Optional")
    if name == "Annotated":
        return _words(items[0])
    if _is_fixed(name, items):
        return [f"a list of {len(items)} values"]
    if name in LISTS:
        inner = items[0]
        named = isinstance(inner, ast.Subscript) and _last(inner.value) == "Literal"
        return [f"a list of {' or '.join(_words(inner))}" if named else WORDS["list"]]
    return [WORDS["dict"] if name in MAPPINGS else name]


def _items(inner: ast.expr) -> list[ast.expr]:
    return inner.elts if isinstance(inner, ast.Tuple) else [inner]


def _is_fixed(name: str, items: list[ast.expr]) -> bool:
    """Whether a tuple's length is said: `tuple[X, ...]` leaves it open."""
    return name == "tuple" and not (len(items) == 2 and isinstance(items[1], ast.Constant))


def _last(node: ast.expr) -> str:
    """The last word of a dotted name: `collections.abc.Sequence` is a Sequence."""
    return ast.unparse(node).rpartition(".")[2]
