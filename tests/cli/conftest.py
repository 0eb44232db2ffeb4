"""A small set of configs whose targets need no torch or are only read, and a verb for it; and one tiny finished run."""

import contextlib
import gc
import io
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from tiny_run import arguments, material

from qat.cli.main import main, positional
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS, Verb
from qat.cli.workbench import Workbench, open_workbench

CONFIGS = {
    "base": """
        defaults:
          - _self_
          - model: small
          - recipe: w4
          - kv: null
          - optim: adamw
          - trainer: auto
          - callbacks: none
          - logger: wandb
        seed: 1
        device: auto
        runs: ${oc.env:QAT_RUNS,runs}
        calibration: {samples: 8, seq_len: 16}
        data: {path: null, seq_len: 16}
        """,
    "run": """
        defaults:
          - base
          - _self_
          - method@arms.sgd: sgd
          - experiment: null
          - debug: null
        verb: run
        """,
    "look": """
        defaults:
          - _self_
        verb: look
        path: null
        """,
    "model/small": "# A small one.\nname: small\npath: null\n",
    "model/hub": "# From the hub.\nname: ???\npath: null\n",
    "recipe/w4": """
        # Four bits.
        _target_: qat.numerics.recipe.Recipe
        rules:
          linears:
            _target_: qat.numerics.recipe.Rule
            match: '.*_proj'
            weight:
              _target_: qat.numerics.scheme.Scheme
              grid: {_target_: qat.numerics.grid.IntGrid, bits: 4}
              granularity: {_target_: qat.numerics.granularity.PerGroup, group_size: 16}
          lm_head: {_target_: qat.numerics.recipe.Rule, match: lm_head, weight: null}
        """,
    "recipe/w3": """
        # Three bits.
        defaults:
          - w4
          - _self_
        rules: {linears: {weight: {grid: {bits: 3}}}}
        """,
    "kv/int8": """
        # @package recipe.kv
        # Eight bits.
        _target_: qat.numerics.scheme.Scheme
        grid: {_target_: qat.numerics.grid.IntGrid, bits: 8}
        granularity: {_target_: qat.numerics.granularity.PerToken}
        dynamic: true
        convention: vllm
        """,
    "optim/adamw": "_target_: torch.optim.AdamW\n_partial_: true\nlr: 1e-4\nbetas: [0.9, 0.95]\n",
    "trainer/auto": "max_steps: 10\nclip: 1.0\ncompile: false\nlightning: {}\n",
    "callbacks/none": "{}\n",
    "logger/none": "wandb: null\n",
    "logger/wandb": "wandb: {project: qat, mode: auto, tags: []}\n",
    "method/sgd": "_target_: torch.optim.SGD\n_partial_: true\nlr: {cpu: 0.1, cuda: 0.2}\n",
    "experiment/quick": "# @package _global_\n# Short.\ntrainer: {max_steps: {cpu: 2, cuda: 4}}\n",
    "experiment/more": "# @package _global_\ndefaults:\n  - /method@arms.more: sgd\n",
    "debug/fast": "# @package _global_\ntrainer: {max_steps: 1}\n",
}


def write(root: Path, configs: dict[str, str]) -> Path:
    """Writes configs, `group/option` to content, below a directory."""
    for name, content in configs.items():
        path = root / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content).lstrip("\n"))
    return root


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packaged"), CONFIGS)


@pytest.fixture(scope="session")
def tree(packaged: Path) -> Tree:
    return Tree((packaged,))


@pytest.fixture
def user(tmp_path: Path):
    """Writes a user's config directory."""
    return lambda **configs: write(tmp_path / "user", {name.replace("__", "/"): text for name, text in configs.items()})


@pytest.fixture(scope="session")
def run() -> Verb:
    return Verb("run", "help", "detail", ("qat run", "qat run"), "run")


@pytest.fixture(scope="session")
def look() -> Verb:
    return Verb("look", "help", "detail", ("qat look", "qat look"), "look", directory=True)


@dataclass(frozen=True)
class Finished:
    """A finished run: its directory, and what it printed."""

    path: Path
    runs: Path
    root: Path
    out: str


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` and `tokens/`."""
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def bench(root: Path, tmp_path: Path) -> Workbench:
    """The workbench of `qat run`, in runs of its own."""
    verb, *texts = arguments(root, "run", f"runs={tmp_path / 'runs'}")
    config, problems = validate(VERBS[verb], positional(VERBS[verb], texts), Tree.of([]))
    assert problems == []
    return open_workbench(config)


@pytest.fixture(scope="session")
def finish(root: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs a verb to its end, once, in runs of its own."""

    def go(verb: str, *more: str) -> Finished:
        runs, out = tmp_path_factory.mktemp(verb), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setenv("QAT_CACHE", str(runs / "cache"))
            assert main(arguments(root, verb, f"runs={runs}", *more)) == 0
        gc.collect()  # Lightning's cycles would hold the run's lock, as a process does until it ends
        return Finished((runs / "latest").resolve(), runs, root, out.getvalue())

    return go


@pytest.fixture(scope="session")
def finished(finish) -> Finished:
    """`qat run`, whole."""
    return finish("run")
