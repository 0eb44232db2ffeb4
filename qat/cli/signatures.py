"""Signatures of what configs name, read from source: the packages that define them are never imported."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from qat.cli import source
from qat.cli.kinds import BUILT


@dataclass(frozen=True)
class Parameter:
    """A parameter that a config can name."""

    name: str
    required: bool
    annotation: ast.expr | None


@dataclass(frozen=True)
class Signature:
    """What a callable takes by keyword; `any_keyword` if the source does not bound it."""

    parameters: dict[str, Parameter]
    any_keyword: bool = False


PLAIN_BASES = ("object", "Generic", "Protocol", "ABC")  # they take no arguments
UNKNOWN = Signature({}, any_keyword=True)


@functools.cache
def signature(target: str) -> Signature:
    """The signature of a dotted name.

    Raises:
        LookupError: The name does not exist, or cannot be called.
    """
    found = source.find(target)
    match found.node:
        case ast.ClassDef() as node:
            return _class(found.module, node)
        case ast.FunctionDef() | ast.AsyncFunctionDef() as node:
            last_but_one = target.rpartition(".")[0].rpartition(".")[2]
            return _function(found.module, node, bound=last_but_one[:1].isupper() and not _has(node, "staticmethod"))
        case ast.Constant():
            raise LookupError(f"{target} is a value, not something to call")
        case _:
            return UNKNOWN


def _class(module: str, node: ast.ClassDef) -> Signature:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _function(module, member, bound=True)
    if _has(node, "dataclass"):
        return Signature({p.name: p for p in _fields(module, node)})
    if any(isinstance(member, ast.FunctionDef) and member.name == "__new__" for member in node.body):
        return UNKNOWN
    bases = [base for base in node.bases if ast.unparse(base).split("[")[0] not in PLAIN_BASES]
    if not bases:
        return Signature({})
    found = source.lookup(module, ast.unparse(bases[0]).split("[")[0])
    return _class(found.module, found.node) if found and isinstance(found.node, ast.ClassDef) else UNKNOWN


def _fields(module: str, node: ast.ClassDef) -> Iterator[Parameter]:
    for base in node.bases:
        found = source.lookup(module, ast.unparse(base))
        if found and isinstance(found.node, ast.ClassDef) and _has(found.node, "dataclass"):
            yield from _fields(found.module, found.node)
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            if "ClassVar" in (kind := ast.unparse(member.annotation)) or "KW_ONLY" in kind:
                continue
            if _keyword(member.value, "init") == "False":
                continue
            has_default = member.value is not None and (
                not _is_field(member.value)
                or bool(_keyword(member.value, "default") or _keyword(member.value, "default_factory"))
            )
            yield Parameter(member.target.id, not has_default, _known(module, member.annotation))


def _function(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = [True] * (len(positional) - len(arguments.defaults)) + [False] * len(arguments.defaults)
    pairs = [*zip(positional, required, strict=True)][1 if bound else 0 :]
    pairs = [pair for pair in pairs if pair[0] not in arguments.posonlyargs]
    pairs += [(arg, default is None) for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return Signature(
        {a.arg: Parameter(a.arg, need, a.annotation and _known(module, a.annotation)) for a, need in pairs},
        any_keyword=arguments.kwarg is not None,
    )


class _Resolve(ast.NodeTransformer):
    """Puts aliases in their place and marks the names of this project's classes."""

    def __init__(self, module: str):
        self.module = module

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str):
            return self.visit(ast.parse(node.value, mode="eval").body)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value).endswith("Literal"):
            return node
        node.slice = self.visit(node.slice)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = source.lookup(self.module, node.id, within=self.module.split(".")[0])
        if found is None or found.node is None:
            return node
        if isinstance(found.node, ast.ClassDef):
            enum = any("Enum" in ast.unparse(base) for base in found.node.bases)
            return node if enum else ast.Name(BUILT + node.id)
        is_type = isinstance(found.node, ast.BinOp | ast.Subscript)
        return _known(found.module, found.node) if is_type else node  # type: ignore[arg-type]


def _known(module: str, annotation: ast.expr) -> ast.expr:
    copy = ast.parse(ast.unparse(annotation), mode="eval").body
    result: ast.expr = _Resolve(module).visit(copy)
    return result


def _has(node: source.Definition, decorator: str) -> bool:
    return any(ast.unparse(d).split("(")[0].rpartition(".")[2] == decorator for d in node.decorator_list)


def _is_field(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "field"


def _keyword(node: ast.expr | None, name: str) -> str | None:
    if not isinstance(node, ast.Call) or not _is_field(node):
        return None
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)
