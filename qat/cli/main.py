"""`qat VERB ...`: dispatch. Imports a verb's module only when the verb is used, and torch never."""

import importlib
import os
import sys

from qat.cli import usage
from qat.cli.errors import guard
from qat.cli.problem import ConfigError, Problem, did_you_mean
from qat.cli.tree import Tree
from qat.cli.verbs import VERBS, Verb


def main(argv: list[str] | None = None) -> int:
    """The command line.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit status: 0 fine, 1 failed at run time, 2 wrong configuration or usage, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # third parties' bars; tqdm reads it when it is imported
    word, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if word in ("-h", "--help", "help"):
        return guard("qat", lambda: _print(usage.overview()))
    if word == "--version":
        return guard("qat", _version)
    verb = VERBS.get(word)
    if verb is None:
        print(f"qat: no verb {word!r}{did_you_mean(word, VERBS)} (there are: {', '.join(VERBS)})", file=sys.stderr)
        return 2
    command = f"qat {verb.name}"
    if "--help" in rest or "-h" in rest:
        return guard(command, lambda: _print(usage.of_verb(verb, Tree.of([]))))
    if verb.primary is None:
        return guard(command, lambda: _module(verb).main(rest))
    return _run(verb, command, rest)


def _run(verb: Verb, command: str, argv: list[str]) -> int:
    """A verb with a config: read it, refuse it or run it."""
    config: dict = {}

    def prepare() -> int:
        from qat.cli.validate import validate  # imports Hydra

        directories, texts = split_options(argv)
        tree = Tree.of(directories)
        for path in tree.clashes():
            print(f"{command}: warning: {path} is hidden by the packaged file of its name; rename it", file=sys.stderr)
        found, problems = validate(verb, positional(verb, texts), tree)
        if problems:
            raise ConfigError(problems)
        config.update(found)
        return 0

    return guard(command, prepare) or guard(command, lambda: _module(verb).main(config), config)


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments as the directories of `--config-dir` and everything else.

    Raises:
        ConfigError: Another option, or `--config-dir` without its directory.
    """
    directories, texts, problems = [], [], []
    arguments = iter(argv)
    for text in arguments:
        name, equals, value = text.partition("=")
        if name == "--config-dir":
            directory = value if equals else next(arguments, "")
            if directory:
                directories.append(directory)
            else:
                problems.append(Problem("--config-dir", "needs a directory"))
        elif text.startswith("-"):
            near = did_you_mean(name, ["--config-dir", "--help"])
            problems.append(Problem(text, f"no such option{near}; settings are written key=value"))
        else:
            texts.append(text)
    if problems:
        raise ConfigError(problems)
    return directories, texts


def positional(verb: Verb, texts: list[str]) -> list[str]:
    """Overrides with a bare directory, where the verb takes one, as `path=`.

    Raises:
        ConfigError: Several directories, or a directory and `path=`.
    """
    if not verb.directory:
        return texts
    bare = [text for text in texts if not text.startswith(("+", "~")) and ("=" not in text or os.path.isdir(text))]
    if not bare:
        return texts
    rest = [text for text in texts if text not in bare]
    if len(bare) > 1 or any(text.lstrip("+").startswith("path=") for text in rest):
        raise ConfigError([Problem(" ".join(bare), f"qat {verb.name} takes one directory, bare or as path=")])
    from qat.cli.overrides import quoted

    key = "run" if os.path.isfile(os.path.join(bare[0], "run.json")) else "path"  # a run stands for its export
    return [f"{key}={quoted(bare[0])}", *rest]


def _module(verb: Verb):
    return importlib.import_module(f"qat.cli.{verb.name}")


def _print(text: str) -> int:
    print(text)
    return 0


def _version() -> int:
    import qat

    return _print(f"qat {qat.__version__}")
