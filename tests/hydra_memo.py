"""Hydra reads and parses some thirty files for each config, and tests compose hundreds: here each file is read once.

What is composed is the same (`test_configs.py` compares). A file that changes is read again.
"""

import copy
from pathlib import Path

import pytest
from hydra._internal import config_repository, defaults_list
from hydra.core.object_type import ObjectType

LOAD = config_repository.ConfigRepository.load_config
COLLECT = defaults_list._create_interpolation_map


def install(patch: pytest.MonkeyPatch) -> None:
    """Files are parsed once, and choices collected only where a defaults list refers to them."""
    known = {}

    def once(self, config_path):
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return LOAD(self, config_path)
        changed = Path(source.path, f"{config_path}.yaml").stat().st_mtime_ns if source.scheme() == "file" else None
        key = source.scheme(), source.path, config_path, changed
        found = known[key] if key in known else known.setdefault(key, LOAD(self, config_path))
        result = copy.copy(found)
        result.config = copy.deepcopy(found.config)
        return result

    def where_needed(overrides, defaults, self_added):
        if not any(default.is_interpolation() for default in defaults):
            return None  # nothing reads it then
        return COLLECT(overrides, defaults, self_added)

    patch.setattr(config_repository.ConfigRepository, "load_config", once)
    patch.setattr(defaults_list, "_create_interpolation_map", where_needed)
