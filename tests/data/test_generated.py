"""What is kept is a pure function of the sequences in their order; a directory is whole or not there, or refused."""

import json

import numpy as np
import pytest

from qat.data.generated import Collection, begin, distinct_share, finish, save_shard, shards, split_of
from qat.data.text import load

SETTINGS = {"seed": 3, "tokens": 4000, "sampling": {"temperature": 1.0}, "splits": {"validation": 0.2, "test": 0.1}}
EOS = 0


def sequence(seed: int, length: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, length, dtype=np.int32)


LOOP = np.tile(sequence(1, 5), 8)


def collect(sequences, tokens=4000, min_distinct=0.3) -> Collection:
    collection = Collection(tokens, min_distinct)
    collection.extend(sequences)
    return collection


def test_duplicates_and_loops_are_dropped_and_counted():
    a, b = sequence(0), sequence(2)
    found = collect([a, LOOP, a.copy(), b, LOOP.copy(), b[:-1]])
    assert list(found.sequences) == [0, 3, 5]
    assert (found.duplicates, found.degenerate, found.num_seen) == (2, 1, 6)
    assert found.num_tokens == 41 + 41 + 40
    assert str(found) == "3 sequences, 122 tokens; dropped 2 duplicates and 1 that loop"
    assert 1 in collect([a, LOOP], min_distinct=0).sequences


def test_the_share_of_distinct_4grams():
    assert distinct_share(np.arange(40)) == 1
    assert distinct_share(np.arange(3)) == 1
    assert distinct_share(np.array([7] * 13)) == 0.1
    assert distinct_share(np.array([1, 2, 3, 4, 5, 1, 2, 3, 4])) == 5 / 6
    assert distinct_share(LOOP) < 0.3 < distinct_share(np.tile(sequence(4, 20), 2))


def test_it_ends_with_the_sequence_that_is_enough():
    found = collect([sequence(i) for i in range(20)], tokens=5 * 41 + 1)
    assert found.full
    assert (found.num_seen, found.num_tokens) == (6, 6 * 41)
    assert not collect([sequence(i) for i in range(5)], tokens=5 * 41 + 1).full
    fresh, half = Collection(1000, 0.3), collect([sequence(i) for i in range(5)], tokens=1000)
    assert fresh.expected(100) == 13
    assert half.expected(100) == 25  # of 41 tokens each


@pytest.mark.parametrize("cuts", [[100], [30, 70], [1] * 100])
def test_shards_put_together_are_the_whole(tmp_path, cuts):
    sequences = [sequence(i, 1 + i) for i in range(100)]
    part, first = begin(tmp_path / "text", SETTINGS), 0
    for count in cuts:
        save_shard(part, first, sequences[first : first + count])
        first += count
    found = [tokens for shard in shards(part) for tokens in shard]
    assert all(map(np.array_equal, found, sequences))
    assert len(found) == 100
    assert {tokens.dtype for tokens in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize("damage", ["truncate", "remove", "shift", "garble"])
def test_damaged_shards_are_named(tmp_path, damage):
    part = begin(tmp_path / "text", SETTINGS)
    for first in range(0, 30, 10):
        save_shard(part, first, [sequence(i) for i in range(first, first + 10)])
    file = sorted(part.glob("*.npz"))[1]
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "garble":
        file.write_bytes(b"")
    elif damage == "shift":
        file.rename(file.with_name("0000000011.npz"))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"\.npz: damaged, or the one before it is missing; delete it"):
        list(shards(part))


def test_finished_is_a_token_directory_with_its_splits(tmp_path):
    out, sequences = tmp_path / "text", [sequence(i) for i in range(98)]
    part = begin(out, SETTINGS)
    save_shard(part, 0, [*sequences, LOOP, sequences[0]])
    collection = collect([tokens for shard in shards(part) for tokens in shard], tokens=98 * 41)
    finish(out, collection, SETTINGS, "digest", EOS)
    tokens = load(out)
    assert not part.exists()
    for split, stream in tokens.streams.items():
        members = [i for i in range(98) if split_of(i, 0.2, 0.1) == split]
        assert stream.tolist() == [t for i in members for t in [*sequences[i].tolist(), EOS]]
        assert len(members) > 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"]["settings"] == SETTINGS
    assert manifest["source"]["counts"] == {"sequences": 98, "duplicates": 0, "degenerate": 0}
    assert tokens.tokenizer == "digest"
    assert begin(out, SETTINGS) is None


def test_splits_have_their_shares():
    splits = [split_of(i, 0.05, 0.1) for i in range(20_000)]
    assert splits.count("validation") == pytest.approx(1000, rel=0.1)
    assert splits.count("test") == pytest.approx(2000, rel=0.1)
    assert {split_of(i, 0, 0) for i in range(100)} == {"train"}


def test_a_split_may_be_empty(tmp_path):
    settings = SETTINGS | {"splits": {"validation": 0, "test": 0}}
    begin(tmp_path / "text", settings)
    finish(tmp_path / "text", collect([sequence(0)], tokens=1), settings, "digest", EOS)
    assert {split: len(stream) for split, stream in load(tmp_path / "text").streams.items()} == {
        **{"train": 41, "validation": 0, "test": 0}
    }


def changed(settings, key):
    value = settings[key]
    return settings | {key: {"temperature": 0.9} if isinstance(value, dict) else value + 1}


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path, key, finished):
    out = tmp_path / "text"
    part = begin(out, SETTINGS)
    save_shard(part, 0, [sequence(0)])
    if finished:
        finish(out, collect([sequence(0)], tokens=1), SETTINGS, "digest", EOS)
    with pytest.raises(ValueError, match=f"made with {key}=.*name another directory with out="):
        begin(out, changed(SETTINGS, key))
    assert begin(out, dict(SETTINGS)) == (None if finished else part)


def test_something_else_and_damage_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    begin(tmp_path / "other", SETTINGS)  # empty: it may become one
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"out=.*other: holds something else"):
        begin(tmp_path / "other", SETTINGS)
    begin(tmp_path / "text", SETTINGS)
    finish(tmp_path / "text", collect([sequence(0)], tokens=1), SETTINGS, "digest", EOS)
    np.save(tmp_path / "text" / "train.npy", sequence(7))
    with pytest.raises(ValueError, match="the tokens are not those"):
        begin(tmp_path / "text", SETTINGS)
