"""Opening our files elsewhere: what is compared is every weight of the file, and whatever differs or fails is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny

from qat.engine.loader import open_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce" / "peers"))


def test_a_difference_of_one_bit_is_seen():
    from opening import compared

    ours = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    assert compared(ours, ours) == {"weights": 2, "of": 2, "max_abs_diff": 0.0}
    assert compared({"a": ours["a"]}, ours) == {"weights": 1, "of": 2, "max_abs_diff": 0.0}
    for other in (torch.ones(2, 2).half(), torch.ones(4), torch.full((2, 2), torch.nan)):
        assert compared(ours | {"a": other}, ours)["max_abs_diff"] == float("inf")
    nudged = torch.nextafter(ours["a"], torch.tensor(2.0))
    assert 0 < compared(ours | {"a": nudged}, ours)["max_abs_diff"] < 1e-6


def test_exports_say_what_we_decode(tmp_path):
    import interop

    model = tiny(layers=1, tied=False)
    for file in interop.FILES:
        rows = interop.export(file, model, None, tmp_path)
        assert [row["dtype"] for row in rows] == list(file.dtypes)
        read = open_checkpoint(tmp_path / str(file))
        for row in rows:
            expected = load_file(row["expected"])
            assert sorted(expected) == sorted(read.tensors)
            assert len(expected) == 7, "the head stays"
            for name, tensor in read.tensors.items():
                assert torch.equal(expected[name], tensor.dequantize(getattr(torch, row["dtype"])))
    assert len({str(file) for file in interop.FILES}) == len(interop.FILES)


def test_what_a_peer_says_lands_in_its_row(tmp_path, monkeypatch):
    import interop

    rows = [{"file": name, "peer": "gptqmodel", "dtype": "float16", "path": "", "expected": ""} for name in "abc"]
    (missing,) = {row["error"] for row in interop.opened(rows, "gptqmodel", tmp_path, tmp_path)}
    assert missing.startswith("no environment")
    python = tmp_path / "gptqmodel" / "bin" / "python"
    python.parent.mkdir(parents=True)
    good = json.dumps({"by": "x", "weights": 7, "of": 7, "max_abs_diff": 0.0})
    bad = json.dumps({"by": "x", "weights": 7, "of": 7, "max_abs_diff": 0.5})
    python.write_text(f"#!/bin/sh\necho noise\necho '{good}'\necho '{bad}'\necho the reason >&2\nexit 3\n")
    python.chmod(0o755)
    first, second, third = interop.opened(rows, "gptqmodel", tmp_path, tmp_path)
    assert [interop.passed(row) for row in (first, second, third)] == [True, False, False]
    assert third["error"] == "ended with 3: the reason"
    assert not interop.passed(first | {"weights": 0, "of": 0}), "nothing compared proves nothing"
    assert not interop.passed(first | {"weights": 6})
    assert "| `a` | gptqmodel | x | float16 | 7 of 7 | 0 |" in interop.table([first])
    manifest = json.loads((tmp_path / "gptqmodel.json").read_text())
    assert [row["file"] for row in manifest] == ["a", "b", "c"]
