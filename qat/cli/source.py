"""Reading Python files without running them: where a name is defined, and which modules need torch.

Names are followed through imports and aliases, in this package and in others, because a config names
`torch.optim.AdamW` and not the file that defines it.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from qat.cli.problem import did_you_mean

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Found:
    """A definition and the module that holds it; `node` is None where the source does not tell (built at run time)."""

    module: str
    node: Definition | ast.expr | None


def module_file(module: str) -> Path | None:
    """The file of a module, found without importing its parents; None if there is none."""
    first, *rest = module.split(".")
    if first in sys.builtin_module_names:
        return None
    spec = PathFinder.find_spec(first)
    if spec is None:
        return None
    if not rest and spec.origin:
        return Path(spec.origin)
    for root in spec.submodule_search_locations or []:
        base = Path(root).joinpath(*rest)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
    return None


@functools.cache
def module_tree(path: Path) -> ast.Module:
    """A parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def split_target(target: str) -> tuple[str, list[str]]:
    """A dotted name as the longest module in it and the rest.

    Raises:
        LookupError: Not even its first word is a package.
    """
    words = target.split(".")
    for end in range(len(words) - 1, 0, -1):
        if module_file(module := ".".join(words[:end])) is not None:
            return module, words[end:]
    raise LookupError(f"no package {words[0]}")


def find(target: str) -> Found:
    """What a dotted name stands for.

    Raises:
        LookupError: A module, or a name in it, does not exist; the nearest one is named.
    """
    module, (name, *rest) = split_target(target)
    found = lookup(module, name)
    if found is None:
        names = sorted({*_names(module), *_submodules(module)})
        raise LookupError(f"{module} has no {name}{did_you_mean(name, names)}")
    for attribute in rest:
        node = found.node
        if not isinstance(node, ast.ClassDef):
            return Found(found.module, None)
        members = {m.name: m for m in node.body if isinstance(m, Definition)}
        if attribute not in members:
            raise LookupError(f"{module}.{node.name} has no {attribute}{did_you_mean(attribute, members)}")
        found = Found(found.module, members[attribute])
    return found


def lookup(module: str, name: str, within: str = "", depth: int = 0) -> Found | None:
    """The definition of a name at the top level of a module, followed through imports and aliases.

    Args:
        module: Where to look.
        name: The name.
        within: The package that imports are followed in; empty for all of them (large ones take long to parse).
        depth: How many modules it has been followed through.

    Returns:
        None if the module has no such name.
    """
    path = module_file(module) if module.startswith(within) else None
    if path is None or path.suffix != ".py" or depth > 20:
        return Found(module, None)
    starred = []
    for node in reversed(list(statements(module_tree(path).body))):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if node.name == name:
                return Found(module, node)
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return _alias(module, value, within, depth)
            case ast.AnnAssign(target=ast.Name(id=found), value=value) if found == name and value is not None:
                return _alias(module, value, within, depth)
            case ast.ImportFrom():
                source = _absolute(module, path, node)
                for alias in node.names:
                    if alias.name == "*":
                        starred.append(source)
                    elif (alias.asname or alias.name) == name:
                        return lookup(source, alias.name, within, depth + 1)
            case ast.Import() if any((alias.asname or alias.name.split(".")[0]) == name for alias in node.names):
                return Found(module, None)
            case ast.FunctionDef(name="__getattr__"):
                return Found(module, None)
    return next((hit for source in starred if (hit := lookup(source, name, within, depth + 1))), None)


def _alias(module: str, value: ast.expr, within: str, depth: int) -> Found:
    if isinstance(value, ast.Name):
        return lookup(module, value.id, within, depth + 1) or Found(module, None)
    return Found(module, value)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What a module executes when it is imported: its statements, also in `if` and `try`, not under TYPE_CHECKING."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from statements(node.body)
            yield from statements(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
                yield from statements(part)
        elif isinstance(node, ast.With):
            yield from statements(node.body)


@functools.cache
def is_light(module: str) -> bool:
    """Whether importing a module of this package needs the standard library alone: such values are built for real."""
    parents = [".".join(module.split(".")[: end + 1]) for end in range(module.count("."))]
    return all(_is_light(name, frozenset()) for name in (*parents, module))


def _is_light(module: str, seen: frozenset[str]) -> bool:
    if module in seen or module.split(".")[0] in sys.stdlib_module_names:
        return True
    path = module_file(module)
    if path is None or module.split(".")[0] != "qat":
        return False
    needed: set[str] = set()
    for node in statements(module_tree(path).body):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, path, node)
            inner = {f"{source}.{alias.name}" for alias in node.names}
            needed |= {source, *(name for name in inner if source.startswith("qat") and module_file(name))}
    return all(_is_light(name, seen | {module}) for name in needed)


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _names(module: str) -> Iterator[str]:
    path = module_file(module)
    for node in statements(module_tree(path).body) if path and path.suffix == ".py" else []:
        if isinstance(node, Definition):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (name.id for name in node.targets if isinstance(name, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _submodules(module: str) -> Iterator[str]:
    path = module_file(module)
    if path and path.name == "__init__.py":
        yield from (p.stem for p in path.parent.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists())
