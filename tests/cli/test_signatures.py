import ast
from textwrap import dedent

import pytest

from qat.cli.kinds import BUILT
from qat.cli.signatures import signature

SOURCE = """
    import dataclasses
    from dataclasses import KW_ONLY, dataclass, field
    from enum import Enum
    from functools import partial
    from typing import Any, ClassVar, Literal

    Mode = Literal["a", "b"]
    Either = int | "Mode"
    CONSTANT = 3

    class Colour(Enum): ...

    @dataclass(frozen=True)
    class Base:
        x: int
        y: float = 1.0

    @dataclasses.dataclass
    class Data(Base):
        shared: ClassVar[int] = 3
        z: "Base | None" = None
        _: KW_ONLY
        names: list[str] = field(default_factory=list)
        hidden: int = field(init=False)
        needed: Either = field(metadata={})
        colour: Colour = Colour()

    class Explicit:
        def __init__(self, a, /, b, c=1, *args, d, e: Mode = "a", **rest): ...

        @classmethod
        def make(cls, n: int): ...

        @staticmethod
        def still(n: int): ...

    class Child(Explicit): ...
    class Bare: ...
    class Outside(unknown.Module): ...
    class Made:
        def __new__(cls, a): ...

    def function(a, b: int = 2, *, c): ...
    bound = partial(function, 1)
    """


@pytest.fixture(autouse=True)
def _package(tmp_path, monkeypatch):
    (tmp_path / "synthetic_signatures.py").write_text(dedent(SOURCE))
    monkeypatch.syspath_prepend(tmp_path)


def described(name):
    found = signature(f"synthetic_signatures.{name}")
    return {key: parameter.required for key, parameter in found.parameters.items()}, found.any_keyword


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("function", ({"a": True, "b": False, "c": True}, False)),
        ("Base", ({"x": True, "y": False}, False)),
        ("Data", ({"x": True, "y": False, "z": False, "names": False, "needed": True, "colour": False}, False)),
        ("Explicit", ({"b": True, "c": False, "d": True, "e": False}, True)),
        ("Child", ({"b": True, "c": False, "d": True, "e": False}, True)),
        ("Explicit.make", ({"n": True}, False)),
        ("Explicit.still", ({"n": True}, False)),
        ("Bare", ({}, False)),
        ("Outside", ({}, True)),
        ("Made", ({}, True)),
        ("bound", ({}, True)),
    ],
)
def test_parameters_and_which_are_required(name, expected):
    assert described(name) == expected


def test_aliases_are_put_in_their_place_and_classes_marked():
    parameters = signature("synthetic_signatures.Data").parameters
    z, needed = parameters["z"].annotation, parameters["needed"].annotation
    assert isinstance(z, ast.BinOp)
    assert isinstance(z.left, ast.Name)
    assert z.left.id == f"{BUILT}Base"
    assert ast.unparse(needed) == "int | Literal['a', 'b']"
    assert ast.unparse(parameters["colour"].annotation) == "Colour"  # a config cannot build an enum


def test_a_value_cannot_be_called():
    with pytest.raises(LookupError, match="is a value"):
        signature("synthetic_signatures.CONSTANT")


@pytest.mark.parametrize("target", ["qat.numerics.scheme.Scheme", "qat.numerics.recipe.Rule", "torch.optim.AdamW"])
def test_source_and_import_agree(target):
    import inspect

    from hydra.utils import get_object

    real = [p for p in inspect.signature(get_object(target)).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert {p.name: p.default is p.empty for p in real} == {
        name: parameter.required for name, parameter in signature(target).parameters.items()
    }
