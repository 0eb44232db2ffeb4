import pytest
import torch
from tiny import tokens

from qat.data.calibration import calibration


def test_windows_of_the_train_split_without_replacement(tmp_path):
    data = tokens(tmp_path / "t")
    batches = calibration(data, 10, 32, 4, seed=3)
    assert [len(b) for b in batches] == [4, 4, 2]
    rows = [tuple(r) for r in torch.cat(batches).tolist()]
    train = {tuple(r) for r in data.windows("train", 32).tolist()}
    assert len(set(rows)) == 10
    assert set(rows) <= train


def test_a_pure_function_of_the_seed(tmp_path):
    data = tokens(tmp_path / "t")
    a, b, c = (torch.cat(calibration(data, 6, 32, size, seed)) for size, seed in ((1, 0), (3, 0), (3, 1)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_more_than_there_is_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"calibration\.samples=300: the train split has 256 windows of 32"):
        calibration(tokens(tmp_path / "t"), 300, 32)
