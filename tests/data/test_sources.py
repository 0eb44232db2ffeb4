"""Splits share nothing; sources read what they say and refuse the rest by name."""

import json

import pytest

from qat.data.sources import Hub, LocalFiles, PythonDocs, cut, paragraphs


def words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def python_docs():
    return PythonDocs(test_tokens=6000, validation_tokens=2000, unit_tokens=2200).documents(words)


def test_python_docs_splits_share_no_paragraph(python_docs):
    sets = {split: {p for d in documents for p in paragraphs(d)} for split, documents in python_docs.items()}
    assert all(sets.values())
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]


def test_python_docs_fill_their_splits_and_train_without_duplicates(python_docs):
    sizes = {split: sum(words(d) + 1 for d in documents) for split, documents in python_docs.items()}
    assert 6000 <= sizes["test"] < 6000 + 2200
    assert 2000 <= sizes["validation"] < 2000 + 2200
    assert sizes["train"] > 10 * sizes["test"]
    train = [" ".join(p.split()) for d in python_docs["train"] for p in d.split("\n\n")]
    train = [p for p in train if len(p) > 80]
    assert len(train) == len(set(train))


def test_python_docs_are_the_same_every_time(python_docs):
    assert PythonDocs(test_tokens=6000, validation_tokens=2000, unit_tokens=2200).documents(words) == python_docs


def test_local_files_of_every_kind(tmp_path):
    texts = [f"document {i}" for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    import datasets

    datasets.Dataset.from_dict({"body": texts}).to_parquet(str(tmp_path / "a.parquet"))
    for pattern, column in (("*.txt", "text"), ("a.jsonl", "body"), ("a.parquet", "body")):
        documents = LocalFiles(str(tmp_path / pattern), column=column).documents(words)
        assert sorted(d for split in documents.values() for d in split) == sorted(texts)
        assert all(documents.values())


def test_named_splits_are_kept_and_missing_ones_cut_by_document():
    documents = cut({"train": ["a", "b"] * 100, "test": ["t"]})
    assert documents["test"] == ["t"]
    assert set(documents["train"]) | set(documents["validation"]) == {"a", "b"}
    assert not set(documents["train"]) & set(documents["validation"])
    many = cut({"train": [str(i) for i in range(2000)]})
    assert len(many["train"]) + len(many["validation"]) + len(many["test"]) == 2000
    assert 60 < len(many["test"]) < 140


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LocalFiles("/nowhere/*.txt"), "no file matches /nowhere"),
        (LocalFiles(__file__), r"names \.py files; one of \.txt"),
        (Hub("nobody/nothing"), r"data\.source\.name=nobody/nothing: not found, or no network"),
    ],
)
def test_what_is_not_there_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        source.documents(words)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(ValueError, match="has no column 'text'; it has body"):
        LocalFiles(str(tmp_path / "a.jsonl")).documents(words)


def test_an_empty_text_file_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("some text")
    pattern = str(tmp_path / "*.txt")
    documents = LocalFiles(pattern, validation=pattern, test=pattern).documents(words)
    assert documents == {split: ["some text"] for split in ("train", "validation", "test")}


def test_what_cannot_be_cut_says_what_is_missing(tmp_path):
    (tmp_path / "a.txt").write_text("one line\nand another\n" * 50)
    with pytest.raises(ValueError, match=r"a\.txt: 1 documents or paragraphs, too few to cut .*data\.source\.\w+="):
        LocalFiles(str(tmp_path / "a.txt")).documents(words)
    (tmp_path / "b.txt").write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text"):
        LocalFiles(str(tmp_path / "b.txt")).documents(words)


def test_one_long_text_is_cut_into_paragraphs(tmp_path):
    text = "\n\n".join(f"paragraph {i} of a long text" for i in range(400))
    (tmp_path / "notes.txt").write_text(text)
    documents = LocalFiles(str(tmp_path / "notes.txt")).documents(words)
    assert sorted(d for split in documents.values() for d in split) == sorted(text.split("\n\n"))
    assert all(len(split) > 5 for split in documents.values())
    whole = {"validation": str(tmp_path / "notes.txt"), "test": str(tmp_path / "notes.txt")}
    assert LocalFiles(str(tmp_path / "notes.txt"), **whole).documents(words)["train"] == [text]
