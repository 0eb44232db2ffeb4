"""The house rules that a machine can check; and that each check bites, on a copy with one violation of each kind."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.cli.source import statements

ROOT = Path(__file__).parents[1]
LIMIT = 400  # lines of a file
BANNED = ("utils", "helpers", "common", "manager", "misc")
SUFFIXES = ("_utils", "_helpers", "_common", "_misc")  # a block_manager is the paging paper's own word
LIGHT = (
    "qat",
    *(f"qat.numerics.{name}" for name in ("grid", "granularity", "scheme", "recipe", "kv", "allocate")),
    "qat.nn.adapter",
    "qat.formats.targets",
    "qat.engine.config",
)
MACHINE = re.compile(r"(?<![\w.~$}])/(home|root|Users|work|mnt|media|scratch)/\w")


def modules(root: Path) -> list[Path]:
    return sorted((root / "qat").rglob("*.py"))


def long_files(root: Path) -> list[str]:
    return [_name(root, path) for path in modules(root) if len(path.read_text().splitlines()) > LIMIT]


def untested(root: Path) -> list[str]:
    """Modules without a test file of their own at the mirrored place."""
    found = []
    for path in modules(root):
        inside = path.relative_to(root / "qat")
        if (
            path.stem not in ("__init__", "__main__")
            and not (root / "tests" / inside.with_name(f"test_{path.name}")).exists()
        ):
            found.append(_name(root, path))
    return found


def banned(root: Path) -> list[str]:
    """Files and folders whose name says nothing."""
    inside = [path.relative_to(root / "qat").with_suffix("").parts for path in modules(root)]
    return ["/".join(parts) for parts in inside if any(part in BANNED or part.endswith(SUFFIXES) for part in parts)]


def eager(root: Path) -> list[str]:
    """`__init__` files that import something when they are imported."""
    found = []
    for path in modules(root):
        if path.name == "__init__.py":
            imports = [
                n for n in statements(ast.parse(path.read_text()).body) if isinstance(n, ast.Import | ast.ImportFrom)
            ]
            names = {
                name
                for n in imports
                for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
            }
            if any(name is None or name.split(".")[0] not in sys.stdlib_module_names for name in names):
                found.append(_name(root, path))
    return found


def machine_paths(root: Path) -> list[str]:
    """Files that name a directory of somebody's machine."""
    files = [path for folder in ("qat", "configs") for path in sorted((root / folder).rglob("*")) if path.is_file()]
    texts = [path for path in files if path.suffix in (".py", ".yaml", ".md", ".cpp", ".cu", ".h", ".json")]
    return [_name(root, path) for path in texts if MACHINE.search(path.read_text(encoding="utf-8"))]


def heavy(root: Path) -> list[str]:
    """Modules of LIGHT, those that exist, whose import imports torch."""
    names = [name for name in LIGHT if name == "qat" or (root / f"{name.replace('.', '/')}.py").exists()]
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); sys.exit('torch' in sys.modules)"
    return [n for n in names if subprocess.run([sys.executable, "-c", code, n], cwd=root, check=False).returncode]


def lint(root: Path, cache: Path) -> str:
    """What import-linter says of a tree."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--cache-dir", str(cache), "--config", "pyproject.toml"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert "Contracts:" in result.stdout, result.stdout + result.stderr
    return result.stdout


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def test_contracts_hold(tmp_path):
    report = lint(ROOT, tmp_path)
    assert " 0 broken" in report, report
    assert f"{len(re.findall(r'importlinter.contracts', (ROOT / 'pyproject.toml').read_text()))} kept" in report


@pytest.mark.parametrize("check", [long_files, untested, banned, eager, machine_paths, heavy], ids=lambda c: c.__name__)
def test_the_tree_keeps_the_rule(check: Callable[[Path], list[str]]):
    assert check(ROOT) == []


# file to its content; each breaks one rule
IMPORTS = {
    "numerics/bad_upward.py": "import qat.kernels\n",
    "training/bad_sibling.py": "import qat.ptq\n",
    "report/bad_sibling.py": "import qat.server\n",
    "numerics/bad_hydra.py": "import hydra\n",
    "data/bad_omegaconf.py": "def late():\n    from omegaconf import OmegaConf\n",
    "nn/bad_lightning.py": "import pytorch_lightning\n",
    "nn/observers/bad_island.py": "import qat.nn.observers.bad_island_two\n",
    "nn/observers/bad_island_two.py": "",
    "ptq/bad_island.py": "import qat.ptq.bad_island_two\n",
    "ptq/bad_island_two.py": "",
    "formats/bad_island.py": "import qat.formats.bad_island_two\n",
    "formats/bad_island_two.py": "",
    "engine/bad_surgery.py": "import qat.surgery\n",
    "server/bad_wandb.py": "import wandb\n",
    "models/bad_wandb.py": "import wandb\n",
    "undeclared/__init__.py": "",
}
REPORTED = {
    "layers point down": [
        "qat.numerics.bad_upward -> qat.kernels",
        "qat.training.bad_sibling -> qat.ptq",
        "qat.report.bad_sibling -> qat.server",
        "- qat.undeclared",
    ],
    "hydra stops at qat/cli": ["qat.numerics.bad_hydra -> hydra", "qat.data.bad_omegaconf -> omegaconf"],
    "lightning stays in training/ and cli/": ["qat.nn.bad_lightning -> pytorch_lightning"],
    "observers are islands": ["qat.nn.observers.bad_island -> qat.nn.observers.bad_island_two"],
    "ptq methods are islands": ["qat.ptq.bad_island -> qat.ptq.bad_island_two"],
    "formats are islands": ["qat.formats.bad_island -> qat.formats.bad_island_two"],
    "the engine runs without the training stack": [
        "qat.engine.bad_surgery -> qat.surgery",
        "qat.server.bad_wandb -> wandb",
    ],
    "wandb stays in training/loggers and cli/tracking": ["qat.models.bad_wandb -> wandb"],
}
FILES = {
    "nn/bad_long.py": "x = 1\n" * (LIMIT + 1),
    "nn/bad_utils.py": "",
    "cli/common/__init__.py": "",
    "nn/manager.py": "",
    "nn/__init__.py": "from torch import nn\n",
    "numerics/grid.py": "import torch\n",
    "nn/bad_path.py": 'HOME = "/home/somebody/models"\n',
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with every violation in it."""
    root = tmp_path_factory.mktemp("broken")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("qat", "configs", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    shutil.copyfile(ROOT / "pyproject.toml", root / "pyproject.toml")
    for name, content in {**IMPORTS, **FILES}.items():
        path = root / "qat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "torch.py").touch()  # stands in for torch, whose import takes seconds
    return root


@pytest.fixture(scope="module")
def sections(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """import-linter's report on the broken copy, by contract."""
    report = lint(broken, tmp_path_factory.mktemp("cache"))
    details = report.partition("Broken contracts")[2]
    parts = re.split(r"\n([^\n]+)\n-{3,}\n", details)
    return dict(zip((title.strip() for title in parts[1::2]), parts[2::2], strict=True))


@pytest.mark.parametrize("contract", REPORTED)
def test_a_broken_contract_is_reported(sections, contract):
    for line in REPORTED[contract]:
        assert line in re.sub(r" \(l\.[^)]*\)", "", sections[contract]), line


def test_no_other_contract_exists():
    written = re.findall(r'importlinter\.contracts\]\]\nname = "([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted(written) == sorted(REPORTED)


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (long_files, "qat/nn/bad_long.py"),
        (untested, "qat/nn/bad_long.py"),
        (banned, "nn/bad_utils"),
        (banned, "cli/common/__init__"),
        (banned, "nn/manager"),
        (eager, "qat/nn/__init__.py"),
        (machine_paths, "qat/nn/bad_path.py"),
        (heavy, "qat.numerics.grid"),
        (heavy, "qat.numerics.recipe"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_a_broken_rule_is_reported(broken, check, name):
    assert name in check(broken)


def test_a_test_elsewhere_does_not_count(broken):
    (broken / "tests/test_bad_long.py").touch()
    assert "qat/nn/bad_long.py" in untested(broken)
    (broken / "tests/nn").mkdir(exist_ok=True)
    (broken / "tests/nn/test_bad_long.py").touch()
    assert "qat/nn/bad_long.py" not in untested(broken)
