"""Hydra reads and parses some thirty files for each config, and tests compose hundreds: here each file is read once.

What is composed is the same. Files of a test's own (in a temporary directory) are always read.
"""

import copy
import tempfile

import pytest
from hydra._internal import config_repository, defaults_list
from hydra.core.object_type import ObjectType


def install(patch: pytest.MonkeyPatch) -> None:
    """Files are parsed once, and choices collected only where a defaults list refers to them."""
    repository, known, temporary = config_repository.ConfigRepository, {}, tempfile.gettempdir()
    load, collect = repository.load_config, defaults_list._create_interpolation_map

    def once(self, config_path):
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or temporary in source.path:
            return load(self, config_path)
        key = source.scheme(), source.path, config_path
        found = known[key] if key in known else known.setdefault(key, load(self, config_path))
        result = copy.copy(found)
        result.config = copy.deepcopy(found.config)
        return result

    def where_needed(overrides, defaults, self_added):
        if not any(default.is_interpolation() for default in defaults):
            return None  # nothing reads it then
        return collect(overrides, defaults, self_added)

    patch.setattr(repository, "load_config", once)
    patch.setattr(defaults_list, "_create_interpolation_map", where_needed)
