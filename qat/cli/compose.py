"""Composition: Hydra's part, and the one place where a config becomes plain Python."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qat.cli.overrides import Overrides, quoted
from qat.cli.problem import ConfigError, Problem, did_you_mean
from qat.cli.tree import Tree


def compose(primary: str, overrides: Overrides, tree: Tree) -> DictConfig:
    """A primary config with its overrides, unresolved, with the choice made for each group under `choices`.

    Raises:
        ConfigError: Hydra cannot put the files together.
    """
    packaged, *user = tree.roots
    try:
        with TemporaryDirectory() as given:  # a directory of configs with what was given by its path
            for option, path in overrides.files.items():
                (target := Path(given, f"{option}.yaml")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            search = ",".join(quoted(f"file://{root}") for root in [*user, given])
            lines = [f"hydra.searchpath=[{search}]", *overrides.lines]
            with initialize_config_dir(str(packaged), version_base="1.3"):  # leaves Hydra's global state as it was
                config = hydra_compose(primary, overrides=lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([Problem("configs", _sentence(error))]) from None
    choices = {k: v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
    with open_dict(config):
        del config["hydra"]
        config["choices"] = dict(sorted(choices.items()))
    return config


def remove(config: DictConfig, keys: list[str]) -> list[Problem]:
    """Removes keys in place; a problem for each that is not there."""
    problems = []
    for key in keys:
        place, _, leaf = key.rpartition(".")
        parent = OmegaConf.select(config, place, throw_on_missing=False) if place else config
        if not isinstance(parent, DictConfig) or leaf not in parent:
            options = [f"{place}.{k!s}".lstrip(".") for k in parent] if isinstance(parent, DictConfig) else []
            problems.append(Problem(f"~{key}", f"not there{did_you_mean(key, options)}"))
            continue
        with open_dict(parent):
            del parent[leaf]
    return problems


def plain(config: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """The config as nested dicts, and a problem for each interpolation that does not resolve; `???` stays."""
    problems = [Problem(path, text) for path, text in _unresolvable(config, "")]
    content = OmegaConf.to_container(config, resolve=not problems, throw_on_missing=False)
    assert isinstance(content, dict)
    return _named(content), problems


def _named(node: Any) -> Any:
    """YAML reads `1:` as a number; here every key is a name."""
    if isinstance(node, dict):
        return {str(key): _named(value) for key, value in node.items()}
    return [_named(value) for value in node] if isinstance(node, list) else node


def _unresolvable(node: DictConfig | ListConfig, path: str) -> list[tuple[str, str]]:
    found = []
    keys: Any = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        where = f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            found.append((where, str(error).splitlines()[0]))
            continue
        if isinstance(value, DictConfig | ListConfig):
            found += _unresolvable(value, where)
    return found


def _sentence(error: BaseException) -> str:
    """Hydra's words and the cause's on one line, without its search path and its advice."""
    text = ": ".join(filter(None, (str(error), str(error.__cause__ or "").partition("\n")[0]))) or type(error).__name__
    return " ".join(re.split(r"(?:Config s|S)earch path:|Set the environment|See https", text)[0].split())
