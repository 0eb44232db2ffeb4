import ast

import pytest

from qat.cli.kinds import BUILT, describe, misfit, mismatches


@pytest.mark.parametrize(
    ("defaults", "value", "expected"),
    [
        ([1], 2, None),
        ([1], True, "expected an integer, found true"),
        ([1], 2.0, "expected an integer, found 2.0"),
        ([1], "2", "expected an integer, found '2'"),
        ([1], None, "expected an integer, found null"),
        ([1.0], 2, None),
        ([1.0], "a", "expected a number, found 'a'"),
        ([True], 1, "expected true or false, found 1"),
        (["a"], 1, "expected text, found 1"),
        ([[1]], {}, "expected a list, found {}"),
        ([None], {"a": 1}, None),  # a default of null says nothing
        ([None, 1], None, None),
        ([None, 1], "a", "expected null or an integer, found 'a'"),
        (["???", "a"], 1, "expected text, found 1"),
        (["${a}"], 1, None),
        ([1], "???", None),
    ],
)
def test_values_against_defaults(defaults, value, expected):
    assert misfit(defaults, value) == expected


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", 1, None),
        ("int", True, "expected an integer, found true"),
        ("int", 64.0, "expected an integer, found 64.0"),
        ("float", 1, None),
        ("float", False, "expected a number, found false"),
        ("bool", 0, "expected true or false, found 0"),
        ("str", 1, "expected text, found 1"),
        ("Path", "a/b", None),
        ("int | None", None, None),
        ("int | None", "a", "expected an integer or null, found 'a'"),
        ("'int | None'", "a", "expected an integer or null, found 'a'"),
        ("Optional[int]", "a", "expected an integer or null, found 'a'"),
        ("Union[int, str]", [], "expected an integer or text, found []"),
        ("Literal['a', 'b']", "c", "expected 'a' or 'b', found 'c'"),
        ("Literal['a', 'b'] | None", None, None),
        ("list[int]", [1, 2], None),
        ("list[int]", [1, "a"], 'expected a list, found [1, "a"]'),
        ("Sequence[Literal['a', 'b']]", ["a"], None),
        ("Sequence[Literal['a', 'b']]", ["c"], "expected a list of 'a' or 'b', found [\"c\"]"),
        ("tuple[float, float]", [1, 2], None),
        ("tuple[float, float]", [1], "expected a list of 2 values, found [1]"),
        ("tuple[float, ...]", [1, 2, 3], None),
        ("Sequence[str]", "a", "expected a list, found 'a'"),
        ("collections.abc.Mapping[str, int]", 3, "expected a mapping, found 3"),
        ("Annotated[int, 'words']", "a", "expected an integer, found 'a'"),
        ("Unheard", object, None),
        ("Callable[[int], str]", 3, None),
        ("int", "???", None),
    ],
)
def test_values_against_annotations(annotation, value, expected):
    found = list(mismatches(ast.parse(annotation, mode="eval").body, value, "a.b"))
    assert found == ([("a.b", expected)] if expected else [])


def test_an_entry_of_a_mapping_is_named_itself():
    annotation = ast.parse("dict[str, int]", mode="eval").body
    assert list(mismatches(annotation, {"x": 1, "y": "z"}, "a")) == [("a.y", "expected an integer, found 'z'")]


def test_a_class_is_a_mapping_with_a_target():
    annotation = ast.BinOp(ast.Name(f"{BUILT}Scheme"), ast.BitOr(), ast.Constant(None))
    assert not list(mismatches(annotation, None, "a"))
    assert not list(mismatches(annotation, {"_target_": "x"}, "a"))
    expected = "expected a mapping with the _target_ of a Scheme or null, found {}"
    assert list(mismatches(annotation, {}, "a")) == [("a", expected)]


def test_long_values_are_not_shown():
    assert describe({"a": "b" * 100}) == "a mapping"
