import json
from dataclasses import dataclass

import numpy as np
import pytest
from tiny import byte_tokenizer, tokens
from transformers import PreTrainedTokenizerFast

from qat.data.text import encode, fingerprint, load, prepare, tokenizer_digest


@dataclass(frozen=True)
class Fixed:
    text: str = "hello"

    def documents(self, count):
        assert count("abc") == 3
        return {"train": [self.text, "b"], "validation": ["cc"], "test": ["d"]}


def test_documents_are_joined_by_eos_and_have_no_bos():
    tokenizer = byte_tokenizer()
    stream = encode(["ab", "", "c"], tokenizer)
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert stream.tolist() == [*ids[:2], 0, 0, ids[2], 0]


def test_prepared_once_found_afterwards_and_portable(tmp_path, monkeypatch):
    first = prepare(Fixed(), byte_tokenizer(), tmp_path)
    monkeypatch.setattr("qat.data.text.encode", None)
    assert prepare(Fixed(), byte_tokenizer(), tmp_path).path == first.path
    moved = first.path.rename(tmp_path / "elsewhere")
    again = prepare(Fixed("not read"), byte_tokenizer(), tmp_path, str(moved))
    assert again.fingerprint == first.fingerprint


def test_the_fingerprint_is_that_of_the_tokens(tmp_path):
    a, b = prepare(Fixed(), byte_tokenizer(), tmp_path), prepare(Fixed("hellp"), byte_tokenizer(), tmp_path)
    assert a.fingerprint != b.fingerprint == fingerprint(b.streams)


def test_windows_do_not_overlap_and_leave_the_rest(tmp_path):
    data = tokens(tmp_path / "t", held_out=100)
    windows = data.windows("test", 16)
    assert windows.shape == (6, 16)
    assert windows.flatten().tolist() == data.streams["test"][:96].tolist()
    assert data.windows("test", 16, 2).shape == (2, 16)
    with pytest.raises(ValueError, match="split test has 100 tokens, 6 windows of 16; 7 asked for"):
        data.windows("test", 16, 7)
    with pytest.raises(ValueError, match="0 windows of 128"):
        data.windows("test", 128)


def test_other_tokenizers_and_damaged_directories_are_refused(tmp_path):
    data = tokens(tmp_path / "t")
    other = byte_tokenizer()
    other.add_tokens(["<x>"])
    assert tokenizer_digest(other) != tokenizer_digest(byte_tokenizer())
    with pytest.raises(ValueError, match="made with another tokenizer"):
        prepare(Fixed(), other, tmp_path, str(data.path))
    stream = np.load(data.path / "train.npy")
    stream[3] += 1
    np.save(data.path / "train.npy", stream)
    with pytest.raises(ValueError, match="the tokens are not those that were prepared"):
        load(data.path)
    (data.path / "test.npy").unlink()
    with pytest.raises(ValueError, match="not a directory of prepared tokens"):
        load(data.path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "[]"),
        ("manifest.json", "null"),
        ("manifest.json", "{"),
        ("manifest.json", '{"fingerprint": "FOUND"}'),
        ("manifest.json", '{"fingerprint": "FOUND", "tokenizer": null}'),
        ("manifest.json", '{"tokenizer": "x"}'),
        ("test.npy", ""),
        ("test.npy", "not an array"),
        ("test.npy", np.int32(7)),
        ("test.npy", np.zeros((2, 3), np.int32)),
        ("test.npy", np.zeros(4, np.int64)),
        ("test.npy", np.array(["a"])),
    ],
    ids=repr,
)
def test_malformed_files_of_a_token_directory_are_refused(tmp_path, file, content):
    data = tokens(tmp_path / "t")
    if isinstance(content, str):
        (data.path / file).write_text(content.replace("FOUND", data.fingerprint))
    else:
        np.save(data.path / file, content)
    with pytest.raises(ValueError, match=str(data.path)) as caught:
        load(data.path)
    assert file in str(caught.value) or content == "{"


def test_an_empty_training_split_and_a_tokenizer_without_eos_are_refused(tmp_path):
    class Empty(Fixed):
        def documents(self, count):
            return {"train": [], "validation": [], "test": []}

    with pytest.raises(ValueError, match="the training split is empty"):
        prepare(Empty(), byte_tokenizer(), tmp_path)
    tokenizer = byte_tokenizer()
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no eos token"):
        prepare(Fixed(), bare, tmp_path)


def test_the_manifest_says_where_the_tokens_come_from(tmp_path):
    data = prepare(Fixed(), byte_tokenizer(), tmp_path)
    manifest = json.loads((data.path / "manifest.json").read_text())
    assert manifest["source"] == {"source": "Fixed", "text": "hello"}
    assert manifest["tokens"] == {"train": 8, "validation": 3, "test": 2}


def test_extra_directories_go_on_where_train_ends(tmp_path):
    base, more = tokens(tmp_path / "a", train=100, held_out=20), tokens(tmp_path / "b", train=300, held_out=60)
    both = prepare(None, byte_tokenizer(), tmp_path, str(base.path), [str(more.path), str(base.path)])
    assert both.streams["train"].tolist() == [
        *base.streams["train"].tolist(),
        *more.streams["train"].tolist(),
        *base.streams["train"].tolist(),
    ]
    assert both.streams["test"].tolist() == base.streams["test"].tolist()
    assert both.fingerprint == fingerprint(both.streams) != base.fingerprint
    joined = prepare(Fixed(), byte_tokenizer(), tmp_path, extra=[str(more.path)])
    assert len(joined.streams["train"]) == 8 + 300
    other = byte_tokenizer()
    other.add_tokens(["<x>"])
    foreign = prepare(Fixed(), other, tmp_path).path
    with pytest.raises(ValueError, match=r"data\.extra=.*: made with another tokenizer"):
        prepare(None, byte_tokenizer(), tmp_path, str(base.path), [str(foreign)])


def test_without_a_source_a_path_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: null; `qat generate out=DIR` makes"):
        prepare(None, byte_tokenizer(), tmp_path)
