"""SIGKILL in a block of `qat ptq`, the same command again: the exported file is the unbroken run's, byte for byte."""

from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny, tokens
from tiny_run import arguments

pytestmark = pytest.mark.whole
ROOT = Path(__file__).parents[1]
METHODS = {
    "gptq": ("method=gptq", "method.asymmetry=0"),
    "gptaq": ("method=gptq",),
    "awq": ("method=awq",),
    "autoround": ("method=autoround", "method.epochs=1"),
    "smoothquant": ("method=smoothquant", "+method@method.then=gptq", "method.alphas=[0.5]"),
    "rotate": ("method=rotate", "+method@method.then=awq"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model of four blocks, its head untied so that rotations may turn it, and tokens."""
    root = tmp_path_factory.mktemp("material")
    tiny(layers=4, tied=False).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    tokens(root / "tokens", train=2048, held_out=256)
    return root


@pytest.mark.parametrize(("seed", "name"), list(enumerate(METHODS)), ids=METHODS)
def test_killed_in_a_random_block_and_repeated_the_bytes_are_those_of_the_unbroken_run(
    root, tmp_path, monkeypatch, capsys, seed, name
):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import kill_resume

    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    small = "evaluation={windows: 1, seq_len: 32, batch_size: 1}"
    overrides = arguments(root, "ptq", *METHODS[name], small, "generate.max_tokens=1")[1:]
    settings = ["--verb", "ptq", "--times", "1", "--seed", str(seed), "--"]
    monkeypatch.setattr("sys.argv", ["kill_resume.py", *settings, *overrides])
    assert kill_resume.main() == 0
    said = capsys.readouterr().out
    assert "1 of 1 equal, bit for bit" in said
    blocks = int(said.partition("resumed at ")[2].partition(",")[0])
    assert 1 <= blocks <= 4
