"""The names that `import qat` promises."""

import importlib
import subprocess
import sys

import pytest

import qat


def test_every_public_name_is_where_it_is_said_to_be():
    for name in qat.__all__:
        home = importlib.import_module(f"qat.{qat._HOMES[name]}")
        assert getattr(qat, name) is getattr(home, name)


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'Recipy'"):
        _ = qat.Recipy


def test_values_do_not_import_torch():
    code = "import sys, qat; qat.Recipe({'l': qat.Rule('x', qat.Scheme(qat.IntGrid(4), qat.PerGroup(64)))})"
    check = "; assert 'torch' not in sys.modules; assert qat.EngineConfig().block_size"
    assert subprocess.run([sys.executable, "-c", code + check], check=False).returncode == 0
