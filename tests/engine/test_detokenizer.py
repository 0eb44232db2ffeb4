"""Text comes whole: characters complete, stop strings caught across tokens, and nothing lost or said twice."""

import random

import pytest

from qat.engine.detokenizer import WINDOW, Detokenizer

TEXT = "naïve café — 東京 🙂👩‍🚀 ok\n" * 4


def encode(text: str) -> list[int]:
    """One token for each byte."""
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def words(tokens: list[int]) -> str:
    """A tokenizer that drops the space before the first word, as many do."""
    return "".join(f" w{token}" for token in tokens).removeprefix(" ")


def feed(tokens: list[int], **arguments) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(decode, **arguments)
    pieces = []
    for token in tokens:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer


def test_the_pieces_are_the_text_and_never_half_a_character() -> None:
    tokens = encode(TEXT)
    assert len(tokens) > 2 * WINDOW
    pieces, _ = feed(tokens)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[TEXT.encode().index("東".encode()) : TEXT.encode().index("東".encode()) + 3] == ["", "", "東"]


def test_a_broken_character_comes_out_at_the_end() -> None:
    pieces, _ = feed(encode("ab東")[:-1])
    assert pieces == ["a", "b", "", "", "\ufffd"]
    pieces, _ = feed([encode("東")[0], *encode("x")])
    assert "".join(pieces) == "\ufffdx"


def test_words_keep_their_spaces() -> None:
    detokenizer = Detokenizer(words, prompt=[1, 2, 3])
    assert [detokenizer.add(token) for token in range(4, 60)] == [f" w{token}" for token in range(4, 60)]
    assert Detokenizer(words).add(7) == "w7"


def test_a_prompt_that_ends_inside_a_character() -> None:
    first, *rest = encode("東")
    detokenizer = Detokenizer(decode, prompt=[*encode("ab"), first])
    assert [detokenizer.add(token) for token in rest] == ["", "東"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello STOP more", ["STOP"], "hello "),
        ("hello STOP", ["STOP"], "hello "),
        ("hello STO", ["STOP"], "hello STO"),
        ("aSTSTOPb", ["STOP"], "aST"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xx東京yy", ["東京"], "xx"),
        ("xx東東京", ["東京", "zz"], "xx東"),
        ("abcdef", ["def", "cd"], "ab"),
        ("abc", ["a"], ""),
        ("no stop here", ["STOP", "never"], "no stop here"),
    ],
)
def test_stop_strings_end_the_text_before_them(text: str, stop: list[str], expected: str) -> None:
    pieces, detokenizer = feed(encode(text), stop=stop)
    assert "".join(pieces) == expected
    assert detokenizer.stopped == any(s in text for s in stop)


def test_what_may_become_a_stop_string_is_held_and_no_more() -> None:
    detokenizer = Detokenizer(decode, stop=["STOP"])
    pieces = [detokenizer.add(token) for token in encode("aSTx")]
    assert pieces == ["a", "", "", "STx"]


def test_a_stop_string_within_one_token() -> None:
    detokenizer = Detokenizer(words, stop=["w5"])
    assert detokenizer.add(4) == "w4"
    assert detokenizer.add(57) == " "
    assert detokenizer.stopped


def test_random_texts_against_a_plain_search() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab東🙂") for _ in range(rng.randint(0, 60)))
        stop = ["".join(rng.choice("ab東🙂") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        read = next((text[:i] for i in range(len(text) + 1) if any(s in text[:i] for s in stop)), None)
        expected = text if read is None else read[: min(read.find(s) for s in stop if s in read)]
        pieces, detokenizer = feed(encode(text), stop=stop)
        assert "".join(pieces) == expected
        assert detokenizer.stopped == (read is not None)
