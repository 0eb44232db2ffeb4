"""A sequence hands out its own tokens, and keeps count of what is cached."""

from qat.engine.config import SamplingParams
from qat.engine.sequence import Sequence


def test_tokens_across_prompt_and_output() -> None:
    sequence = Sequence(0, (1, 2, 3), SamplingParams(), max_len=9)
    sequence.output += [4, 5]
    whole = [1, 2, 3, 4, 5]
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.tokens(start, stop) == whole[start:stop]
    assert len(sequence) == 5


def test_draws_once_the_greedy_tokens_are_said() -> None:
    sequence = Sequence(0, (1, 2, 3), SamplingParams(temperature=1.0, greedy_tokens=2), max_len=9)
    said = []
    for token in range(4):
        said.append(sequence.draws)
        sequence.output.append(token)
    assert said == [False, False, True, True]
    assert not Sequence(0, (1,), SamplingParams(temperature=0.0), max_len=9).draws


def test_counts_what_is_left_to_compute() -> None:
    sequence = Sequence(0, (1, 2, 3), SamplingParams(), max_len=9)
    assert sequence.num_uncomputed == 3
    sequence.num_computed = 3
    sequence.output.append(4)
    assert sequence.num_uncomputed == 1


def test_seeds() -> None:
    assert Sequence(0, (1,), SamplingParams(seed=-7), max_len=9).seed == -7
    drawn = {Sequence(0, (1,), SamplingParams(), max_len=9).seed for _ in range(4)}
    assert len(drawn) == 4
