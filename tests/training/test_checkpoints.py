import pytest
import torch

from qat.training.checkpoints import AtomicCheckpointIO, newest


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.ones(3)}, path)

    def half(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    assert [p.name for p in path.parent.iterdir()] == ["step=1.ckpt"]


def test_newest_is_the_one_with_the_most_steps(tmp_path):
    assert newest(tmp_path) is None
    for step in (9, 10, 2):
        (tmp_path / f"step={step}.ckpt").touch()
    assert newest(tmp_path).name == "step=10.ckpt"
