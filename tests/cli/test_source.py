import ast
import subprocess
import sys

import pytest

from qat.cli import source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package `synthetic` of a few modules, which nothing may import."""
    files = {
        "__init__": "from synthetic.api import Alias as Public\nfrom synthetic.star import *\nraise RuntimeError",
        "api": "from .sub.deep import Deep\nAlias = Deep\nVALUE = 3\nif True:\n    def inner(): ...\n",
        "star": "class Starred: ...\n",
        "dynamic": "def __getattr__(name): ...\n",
        "loop": "from synthetic.loop import again\n",
        "sub/__init__": "",
        "sub/deep": "class Deep:\n    def method(self, x): ...\n",
    }
    for name, text in files.items():
        path = tmp_path / "synthetic" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "module", "kind"),
    [
        ("synthetic.sub.deep.Deep", "synthetic.sub.deep", ast.ClassDef),
        ("synthetic.api.Alias", "synthetic.sub.deep", ast.ClassDef),
        ("synthetic.Public", "synthetic.sub.deep", ast.ClassDef),
        ("synthetic.Starred", "synthetic.star", ast.ClassDef),
        ("synthetic.api.inner", "synthetic.api", ast.FunctionDef),
        ("synthetic.api.VALUE", "synthetic.api", ast.Constant),
        ("synthetic.Public.method", "synthetic.sub.deep", ast.FunctionDef),
        ("synthetic.dynamic.anything", "synthetic.dynamic", type(None)),
        ("synthetic.loop.again", "synthetic.loop", type(None)),
        ("torch.optim.AdamW", "torch.optim.adamw", ast.ClassDef),
        ("pytorch_lightning.callbacks.EarlyStopping", "pytorch_lightning.callbacks.early_stopping", ast.ClassDef),
    ],
)
def test_names_are_followed_without_importing(package, target, module, kind):
    found = source.find(target)
    assert found.module == module
    assert isinstance(found.node, kind)
    assert "synthetic" not in sys.modules


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere.Thing", "no package nowhere"),
        ("synthetic.api.Alia", "synthetic.api has no Alia; did you mean Alias?"),
        ("synthetic.ap.Alias", "synthetic has no ap; did you mean api?"),
        ("synthetic.Public.methid", "synthetic.Deep has no methid; did you mean method?"),
        ("torch.optim.AdmaW", "torch.optim has no AdmaW; did you mean AdamW?"),
    ],
)
def test_what_does_not_exist_names_the_nearest(package, target, words):
    with pytest.raises(LookupError) as caught:
        source.find(target)
    assert words in str(caught.value)


@pytest.mark.parametrize("module", ["grid", "granularity", "scheme", "recipe"])
def test_values_are_light(module):
    assert source.is_light(f"qat.numerics.{module}")


@pytest.mark.parametrize("module", ["qat.numerics.affine", "qat.formats.base", "synthetic.star", "qat.nothing"])
def test_modules_that_need_torch_or_are_not_ours_are_not_light(package, module):
    assert not source.is_light(module)


def test_light_modules_do_not_import_torch():
    code = "import sys; import qat.numerics.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_type_checking_imports_do_not_weigh():
    body = ast.parse(
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import json\ntry:\n    import re\nexcept E: ..."
    ).body
    names = [alias.name for node in source.statements(body) if isinstance(node, ast.Import) for alias in node.names]
    assert names == ["json", "re"]
