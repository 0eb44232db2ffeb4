"""The help texts: from the table of verbs and the config files, without Hydra, in well under a second."""

import re

from qat.cli.tree import Tree, read_yaml
from qat.cli.verbs import VERBS, Verb


def overview() -> str:
    """`qat --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS.values()]
    return "\n".join(
        [
            "usage: qat VERB [DIR] [key=value ...] [--config-dir DIR] [--help]",
            "",
            "Quantization-aware training for LLMs: train, compare with the strongest PTQ, export, prove and serve.",
            "",
            *lines,
            "",
            "Start with `qat run experiment=quickstart`. `qat VERB --help` lists groups, options and keys.",
            "Exit status: 0 fine, 1 failed at run time, 2 wrong configuration or usage, 130 interrupted.",
        ]
    )


def of_verb(verb: Verb, tree: Tree) -> str:
    """`qat VERB --help`."""
    config_dir = " [--config-dir DIR]" if verb.primary or verb.name == "configs" else ""
    lines = [f"usage: qat {verb.name} {verb.usage}{config_dir}", "", verb.detail]
    if verb.primary:
        slots = tree.slots(verb.primary)
        width = max((len(slot.key) for slot in slots), default=0)
        lines += ["", "groups (group=option; the default in brackets):"] if slots else []
        for slot in slots:
            options = [f"[{o}]" if o == slot.option else o for o in tree.options(slot.group)]
            lines.append(f"  {slot.key:<{width}}  {' '.join(options)}")
        lines += ["", "keys (key=value; `qat configs show` prints every one):", *_keys(verb.primary, tree)]
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in verb.examples)])


def _keys(primary: str, tree: Tree) -> list[str]:
    """The top-level keys that a primary config and its bases state themselves, as they are written there."""
    found: dict[str, str] = {}
    for name in [*(e for e in read_yaml(_file(tree, primary)).get("defaults", []) if isinstance(e, str)), primary]:
        if name == "_self_":
            continue
        for line in _file(tree, name).read_text(encoding="utf-8").splitlines():
            if (match := re.match(r"(\w+):\s*(.*)", line)) and match[1] not in ("defaults", "verb"):
                found[match[1]] = match[2] or "..."
    width = max(map(len, found), default=0)
    return [f"  {key:<{width}}  {value}" for key, value in found.items()]


def _file(tree: Tree, name: str):
    path = tree.find(name)
    assert path is not None, name
    return path
