import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.cli.main import main


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.path / "export" / "compressed_tensors", tmp_path / "ct")


def test_the_runs_export(finished, capsys):
    assert main(["verify", f"runs={finished.runs}", "device=cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(finished.path / "export" / "compressed_tensors")
    assert out[1] == "train == serve: VERIFIED"


def test_a_directory_that_was_moved(copy, capsys):
    assert main(["verify", str(copy), "device=cpu", "json=true"]) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["verified"]
    assert certificate["arm"] == "qat"
    assert "sha256" not in certificate


def test_one_flipped_bit_is_named_and_the_status_says_so(copy, capsys):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(copy), "device=cpu"]) == 1
    err = capsys.readouterr().err
    assert f"{name.removesuffix('.weight_packed')}.codes is not what verify.json certifies" in err
    assert err.count("\n") == 1


def test_without_a_certificate_it_says_what_it_could_not_check(copy, capsys):
    (copy / "verify.json").unlink()
    shutil.rmtree(copy / "verify")
    assert main(["verify", str(copy), "device=cpu"]) == 1
    out = capsys.readouterr().out
    assert "NOT VERIFIED" in out
    assert "tensors: no certificate lies beside the checkpoint" in out
    assert "logits and greedy tokens: no reference lies beside the checkpoint" in out
    assert not (copy / "verify.json").exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_one_sentence(copy, capsys, damage):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    assert main(["verify", str(copy), "device=cpu"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_what_is_no_checkpoint_is_a_usage_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no checkpoint: it holds no config.json" in capsys.readouterr().err
