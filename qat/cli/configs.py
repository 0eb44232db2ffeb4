"""`qat configs ls | show | cp | validate`: the config files, looked at without running anything."""

import shutil
import sys
from pathlib import Path

import yaml

from qat.cli.main import positional, split_options
from qat.cli.problem import ConfigError, Problem, did_you_mean, report
from qat.cli.tree import Tree, comment
from qat.cli.verbs import VERBS, Verb

COPIES = "my_configs"  # not `configs`: in a source tree that is where the packaged ones are


def main(argv: list[str]) -> int:
    """The subcommands; `--config-dir DIR` adds a directory for each of them."""
    directories, texts = split_options(argv)
    tree = Tree.of(directories)
    commands = {"ls": ls, "show": show, "cp": cp, "validate": check}
    word, *rest = texts or ["ls"]
    if word not in commands:
        text = f"no such subcommand{did_you_mean(word, commands)} (there are: {', '.join(commands)})"
        raise ConfigError([Problem(word, text)])
    return commands[word](rest, tree)


def ls(argv: list[str], tree: Tree) -> int:
    """Groups and their options, each with the first line of its comment."""
    groups = tree.groups()
    for group in argv:
        if group not in groups:
            text = f"no such group{did_you_mean(group, groups)} (there are: {', '.join(groups)})"
            raise ConfigError([Problem(group, text)])
    for group in argv or groups:
        options = tree.options(group)
        width = max(map(len, options))
        print(group, *(f"  {option:<{width}}  {comment(path)}".rstrip() for option, path in options.items()), sep="\n")
    return 0


def show(argv: list[str], tree: Tree) -> int:
    """The composed config of a verb as YAML, its choices as comments; problems go to the standard error stream."""
    from qat.cli.validate import validate

    verb, texts = _verb(argv)
    config, problems = validate(verb, positional(verb, texts), tree, files=False)
    for key, option in config.pop("choices", {}).items():
        print(f"# {key}: {'null' if option is None else option}")
    if config:
        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120).rstrip())
    if problems:
        print(report(f"qat configs show {verb.name}", problems), file=sys.stderr)
    return 2 if problems else 0


def cp(argv: list[str], tree: Tree) -> int:
    """Copies an option to a directory of configs, or to a YAML file in one, under a name of its own."""
    if len(argv) not in (1, 2) or argv[0].count("/") != 1:
        raise ConfigError([Problem("cp", "takes group/option and, if you like, a directory or a .yaml file")])
    group, option = argv[0].removesuffix(".yaml").split("/")
    source = tree.require(group, option)
    destination = Path(argv[1] if len(argv) == 2 else COPIES)
    if destination.suffix != ".yaml":
        destination = destination / group / f"my_{option}.yaml"
    if destination.parent.name != group:
        text = f"the folder of an option is its group: {destination.parent / group / destination.name}"
        raise ConfigError([Problem(str(destination), text)])
    if destination.exists():
        raise ConfigError([Problem(str(destination), "exists; name another file")])
    if tree.find(f"{group}/{destination.stem}") is not None:
        raise ConfigError([Problem(str(destination), "a packaged option has this name and would win; choose another")])
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    print(f"copied to {destination}; edit it, then use it as")
    print(f"  qat {_user(group, tree)} --config-dir {destination.parent.parent} {group}={destination.stem}")
    return 0


def check(argv: list[str], tree: Tree) -> int:
    """Validates a verb's config as the verb itself would, without running it."""
    from qat.cli.validate import validate

    verb, texts = _verb(argv)
    _, problems = validate(verb, positional(verb, texts), tree)
    if problems:
        print(report(f"qat configs validate {verb.name}", problems), file=sys.stderr)
        return 2
    print(f"qat {verb.name} {' '.join(texts)}".rstrip() + ": fine")
    return 0


def _verb(argv: list[str]) -> tuple[Verb, list[str]]:
    """The verb that stands first, `run` if none does, and the rest."""
    if not argv or "=" in argv[0] or argv[0].startswith(("+", "~")):
        return VERBS["run"], argv
    verb = VERBS.get(argv[0])
    if verb is None or verb.primary is None:
        words = [name for name, other in VERBS.items() if other.primary]
        text = f"no verb with a config{did_you_mean(argv[0], words)} (there are: {', '.join(words)})"
        raise ConfigError([Problem(argv[0], text)])
    return verb, argv[1:]


def _user(group: str, tree: Tree) -> str:
    """The first verb that has a group."""
    verbs = [verb for verb in VERBS.values() if verb.primary]
    return next((v.name for v in verbs if any(slot.key == group for slot in tree.slots(v.primary or ""))), "run")
