"""Reference logits are the model's own, and survive the file bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

from qat.evaluation.reference import FILE, KL_BOUND, LOGIT_BOUND, Sequence, close, compared, decode, load, save

PROMPT = torch.tensor([5, 9, 200, 31])


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def sequence(model):
    return decode(model, PROMPT, 12)


@pytest.fixture
def directory(tmp_path):
    """An export as far as it matters here."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_tokens_are_those_that_transformers_generates(model, sequence):
    expected = model.generate(PROMPT[None], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True)
    assert sequence.ids.tolist() == expected[0].tolist()
    assert sequence.prompt == 4
    assert sequence.generated == expected[0, 4:].tolist()
    assert len(set(sequence.generated)) > 3


def test_row_t_precedes_token_t_plus_1(model, sequence):
    with torch.no_grad():
        whole = model(input_ids=sequence.ids[None]).logits[0]
    assert sequence.logits.shape == (15, 256)
    assert sequence.logits.dtype == torch.float32
    assert torch.allclose(sequence.logits, whole[:-1], atol=1e-5)
    assert sequence.logits[3:].argmax(-1).tolist() == sequence.generated


def test_eos_does_not_stop_it(model, sequence):
    eos = sequence.generated[1]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id = eos
    try:
        again = decode(model, PROMPT, 12)
    finally:
        model.generation_config.eos_token_id = model.config.eos_token_id = before
    assert torch.equal(again.ids, sequence.ids)


def test_autocast_around_it_changes_nothing(model, sequence):
    with torch.autocast("cpu", torch.bfloat16):
        again = decode(model, PROMPT, 12)
    assert torch.equal(again.logits, sequence.logits)


def test_load_of_save_is_the_same(directory, model):
    sequences = [decode(model, torch.tensor(prompt), 3) for prompt in ([5, 9], [77], [1, 2, 3])]
    save(directory, sequences)
    found = load(directory)
    assert len(found) == 3
    for a, b in zip(sequences, found, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.logits, b.logits)
        assert a.prompt == b.prompt


def test_the_file_lies_apart_from_the_weights(directory, sequence):
    """Serving tools read every safetensors file in a checkpoint directory as weights."""
    save(directory, [sequence])
    assert list(directory.glob("*.safetensors")) == []
    assert (directory / FILE).is_file()


def test_whoever_may_read_the_export_may_read_the_reference(directory, sequence):
    (directory / "config.json").chmod(0o644)
    save(directory, [sequence])
    assert (directory / FILE).stat().st_mode & 0o777 == 0o644


def test_no_file_is_no_reference(tmp_path):
    assert load(tmp_path) == []


def test_a_damaged_file_is_named(directory, model):
    save(directory, [decode(model, torch.tensor(prompt), 3) for prompt in ([5, 9], [77])])
    file = directory / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"reference\.safetensors: damaged"):
        load(directory)
    file.write_bytes(whole)
    parts = load_file(file)
    del parts["0.ids"], parts["1.ids"], parts["1.prompt"]
    save_file(parts, file)
    with pytest.raises(ValueError, match=r"reference\.safetensors: damaged"):
        load(directory)


def logits_of(sequence, logits):
    return compared([logits], [Sequence(sequence.ids, sequence.prompt, sequence.logits)])


def test_logits_are_close_within_both_bounds(sequence):
    row = logits_of(sequence, sequence.logits)
    assert row == {"max_abs_logit_diff": 0, "max_abs_logit": float(sequence.logits.abs().max()), "max_kl": 0}
    assert close(row)
    shift = LOGIT_BOUND * row["max_abs_logit"]
    assert close(logits_of(sequence, sequence.logits + 0.9 * shift))  # softmax does not see it
    assert not close(logits_of(sequence, sequence.logits + 1.1 * shift))


def test_the_bounds_are_those_that_are_published():
    row = {"max_abs_logit_diff": 0.99e-3, "max_abs_logit": 10.0, "max_kl": 0.99e-5}
    assert close(row)
    assert not close(row | {"max_abs_logit_diff": 1.01e-3})
    assert not close(row | {"max_kl": 1.01e-5})


def test_max_kl_is_that_of_the_worst_token(sequence):
    """In closed form: one logit moved by d changes KL from 0 to log(1 + p (e^d - 1)) - p d."""
    moved, d = sequence.logits.clone(), 0.5
    moved[:, 3] += d
    p = sequence.logits.double().softmax(-1)[:, 3]
    expected = (1 + p * torch.expm1(torch.tensor(d, dtype=torch.float64))).log() - p * d
    assert logits_of(sequence, moved)["max_kl"] == pytest.approx(float(expected.max()), rel=1e-5)


def test_one_large_logit_does_not_excuse_the_others(sequence):
    large = sequence.logits.clone()
    large[:, 7] = -1e6
    noise = torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    row = compared([large + noise], [Sequence(sequence.ids, sequence.prompt, large)])
    assert row["max_abs_logit_diff"] < LOGIT_BOUND * row["max_abs_logit"]
    assert row["max_kl"] > 1e3 * KL_BOUND
    assert not close(row)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_nothing_is_close_to_what_is_not_finite(sequence, value):
    odd = sequence.logits.clone()
    odd[2, 5] = value
    assert not close(compared([odd], [Sequence(sequence.ids, sequence.prompt, odd)]))
    assert not close(compared([odd], [sequence]))
    assert not close(compared([sequence.logits], [Sequence(sequence.ids, sequence.prompt, odd)]))
