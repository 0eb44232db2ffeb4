"""The tree of config files: groups, options, comments, raw contents. Knows nothing of Hydra, so that help is fast."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qat.cli.problem import ConfigError, Problem, did_you_mean

PACKAGE_HEADER = "# @package"
GLOBAL_HEADER = f"{PACKAGE_HEADER} _global_"
GLOBAL_GROUPS = ("experiment", "debug")  # their options are diffs of the whole config, not a node of it


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as OmegaConf reads it: 1e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def config_dir() -> Path:
    """The packaged configs: `qat/configs` of an installed package, `configs` beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if (installed / "run.yaml").is_file() else package.parent / "configs"


@functools.cache
def read_yaml(path: Path) -> dict[str, Any]:
    """A config file as it stands, before composition.

    Raises:
        ConfigError: It is no YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([Problem(where, f"not readable as YAML ({getattr(error, 'problem', error)})")]) from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError([Problem(str(path), f"expected a mapping, found {type(content).__name__}")])
    return content or {}


def comment(path: Path) -> str:
    """The first line of comment in a config file that is not Hydra's header."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.removeprefix("#").strip()
    return ""


@dataclass(frozen=True)
class Slot:
    """One entry of a defaults list: a group, the place its option fills, and the option."""

    group: str
    place: str
    option: str | None

    @property
    def key(self) -> str:
        """What an override calls it."""
        return self.group if self.place == self.group else f"{self.group}@{self.place}"


@dataclass(frozen=True)
class Tree:
    """Config directories in the order in which they are searched; the packaged one is first, so it wins."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, user: list[str]) -> "Tree":
        """The packaged configs and the user's directories.

        Raises:
            ConfigError: A directory does not exist.
        """
        paths = [Path(name).expanduser().resolve() for name in user]
        missing = [Problem(f"--config-dir {path}", "no such directory") for path in paths if not path.is_dir()]
        if missing:
            raise ConfigError(missing)
        return cls((config_dir(), *paths))

    def find(self, relative: str) -> Path | None:
        """The file of `group/option` or of a primary config."""
        return next((p for root in self.roots if (p := root / f"{relative}.yaml").is_file()), None)

    def groups(self) -> list[str]:
        """Every folder that holds options."""
        return sorted({path.parent.relative_to(root).as_posix() for root, path in self._files()} - {"."})

    def options(self, group: str) -> dict[str, Path]:
        """Options of a group to their files."""
        found: dict[str, Path] = {}
        for root in self.roots:
            for path in sorted((root / group).glob("*.yaml")):
                found.setdefault(path.stem, path)
        return dict(sorted(found.items()))

    def require(self, group: str, option: str) -> Path:
        """The file of an option.

        Raises:
            ConfigError: There is none; the options that exist are named.
        """
        if path := self.find(f"{group}/{option}"):
            return path
        options = list(self.options(group))
        text = f"no such option{did_you_mean(option, options)} (there are: {', '.join(options)})"
        raise ConfigError([Problem(f"{group}={option}", text)])

    def clashes(self) -> list[Path]:
        """Files of the user's that a packaged file of the same name hides."""
        ours = self.roots[0]
        return [path for root, path in self._files() if root != ours and (ours / path.relative_to(root)).exists()]

    def slots(self, name: str) -> list[Slot]:
        """The defaults list of a primary config or of a `_global_` option, inherited ones included, in order."""
        found: dict[str, Slot] = {}
        for entry in self._defaults(name):
            if isinstance(entry, str):
                found |= {slot.key: slot for slot in self.slots((Path(name).parent / entry).as_posix())}
            else:
                (key, option), *_ = entry.items()
                group, _, place = str(key).split()[-1].lstrip("/").partition("@")
                slot = Slot(group, place or group.replace("/", "."), option)
                found[slot.key] = slot
        return list(found.values())

    def target(self, slot: Slot) -> str:
        """The place that a slot's options really fill: another one, if their header names it."""
        for path in self.options(slot.group).values():
            header = path.read_text(encoding="utf-8").partition("\n")[0]
            if header.startswith(PACKAGE_HEADER) and slot.key == slot.group:
                return header.removeprefix(PACKAGE_HEADER).strip()
        return slot.place

    def bases(self, name: str) -> list[dict[str, Any]]:
        """Contents of a config and of the ones it extends, its own last, without their defaults lists.

        An option that takes in another group's, as `/method@place: gptq`, has its contents at that place.
        """
        inherited: list[dict[str, Any]] = []
        for entry in self._defaults(name):
            if isinstance(entry, str):
                inherited += self.bases((Path(name).parent / entry).as_posix())
            elif (key := str(next(iter(entry)))).startswith("/"):
                group, _, place = key.lstrip("/").partition("@")
                inherited += [{place: content} for content in self.bases(f"{group}/{entry[key]}")]
        path = self.find(name)
        assert path is not None, name
        return [*inherited, {key: value for key, value in read_yaml(path).items() if key != "defaults"}]

    def _defaults(self, name: str) -> list[Any]:
        path = self.find(name)
        if path is None:
            raise ConfigError([Problem(name, "a defaults list names it, but no config has this name")])
        entries = read_yaml(path).get("defaults", [])
        if not isinstance(entries, list) or not all(isinstance(e, str) or (isinstance(e, dict) and e) for e in entries):
            raise ConfigError([Problem(str(path), "defaults: expected a list of `group: option`")])
        return [entry for entry in entries if entry != "_self_"]

    def _files(self) -> Iterator[tuple[Path, Path]]:
        for root in self.roots:
            yield from ((root, path) for path in sorted(root.rglob("*.yaml")))
