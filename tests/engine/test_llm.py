"""Law (g): the engine's greedy tokens and logits are Hugging Face's, however its work is cut up. And text around it."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.llm import LLM
from qat.evaluation.reference import Sequence, decode
from qat.nn.kv import quantize_kv
from qat.numerics.kv import KINDS

FAMILIES = ["llama", "llama_biased", "mistral", "qwen2", "qwen3"]
SCHEMES = ["w4_g32", "w3_g32", "w8_channel_asym"]
PROMPTS = [[7, 3, 200, 45, 9], [11], list(range(40, 77)), [250, 1, 1, 2, 90, 33, 8, 64, 128, 255, 0, 17]]
GREEDY = SamplingParams(max_tokens=32)
RESERVE = {"device": "cpu", "kernel": "reference"}

# Pages, chunked prefill (a budget below the prompts), few seats, and a pool in which only two of the four fit.
SHAPES = [
    {"block_size": 1, "num_blocks": 300},
    {"block_size": 4, "max_num_batched_tokens": 3},
    {"block_size": 16, "max_num_batched_tokens": 16, "max_num_seqs": 2},
    {"block_size": 4, "num_blocks": 26, "max_num_batched_tokens": 24},
]


def expected(checkpoint) -> list[list[int]]:
    if not hasattr(checkpoint, "expected"):
        checkpoint.expected = [checkpoint.greedy(prompt) for prompt in PROMPTS]
        assert all(len(set(tokens)) >= 8 for tokens in checkpoint.expected), (
            "a model that says too little proves little"
        )
    return checkpoint.expected


def check_greedy(checkpoint, shape: dict) -> LLM:
    llm = LLM(checkpoint.path, EngineConfig(**RESERVE, **shape))
    completions = llm.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in completions] == expected(checkpoint)
    assert {c.finish_reason for c in completions} == {"length"}
    llm.check_integrity()
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
    return llm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_of_plain_checkpoints(saved: Callable, family: str, shape: dict) -> None:
    llm = check_greedy(saved(family), shape)
    if shape.get("num_blocks") == 26:
        assert llm.engine.scheduler.num_preemptions > 0, "the pool was to be too small"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_of_packed_checkpoints(saved: Callable, family: str, scheme: str) -> None:
    checkpoint = saved(family, scheme)
    for shape in SHAPES[1:4:2]:
        llm = check_greedy(checkpoint, shape)
    assert llm.loaded.weight_bytes <= 1.1 * llm.loaded.file_bytes


@pytest.mark.parametrize("scheme", ["w4_embed8", "w3_embed4_asym"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_and_logits_with_a_packed_embedding(saved: Callable, family: str, scheme: str) -> None:
    """Tied (Llama, Qwen3), where the head multiplies by the same words, and untied."""
    checkpoint = saved(family, scheme)
    llm = check_greedy(checkpoint, SHAPES[3])
    logits = checkpoint.logits(PROMPTS[2])
    scores = llm.score([PROMPTS[2]])[0]
    assert float((scores - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
    fast = LLM(checkpoint.path, EngineConfig(device="cpu", block_size=4))
    scores = fast.score([PROMPTS[2]])[0]
    assert float((scores - logits).norm() / logits.norm()) < 0.05
    for each in (llm, fast):
        assert each.loaded.weight_bytes <= 1.1 * each.loaded.file_bytes
        assert (each.loaded.model.head is each.loaded.model.embedding.linear) is (family != "qwen2")


@pytest.mark.parametrize(
    ("family", "scheme"), [*itertools.product(FAMILIES, [None]), *itertools.product(["mistral"], SCHEMES)]
)
def test_scores_are_the_logits(saved: Callable, family: str, scheme: str | None) -> None:
    checkpoint = saved(family, scheme)
    llm = LLM(checkpoint.path, EngineConfig(**RESERVE, block_size=4, max_num_batched_tokens=7))
    tokens = PROMPTS[2]
    logits = checkpoint.logits(tokens)
    other = checkpoint.logits(PROMPTS[0])
    for prefill in (None, [0, 1], [1, 0], [20, len(PROMPTS[0])]):
        scores, beside = llm.score([tokens, PROMPTS[0]], prefill)
        assert scores.dtype == torch.float32
        assert scores.shape == (37, 256)
        assert float((scores - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
        assert float((beside - other).abs().max()) <= 1e-4 * float(other.abs().max())
        llm.check_integrity()


def quantized(checkpoint, kind: str) -> list[Sequence]:
    """What Hugging Face makes of the prompts with keys and values on a grid, in fp64."""
    if kind not in checkpoint.quantized:
        model = copy.deepcopy(checkpoint.model)
        quantize_kv(model, KINDS[kind])
        checkpoint.quantized[kind] = [decode(model, torch.tensor(prompt), 32, torch.float64) for prompt in PROMPTS]
        assert all(len(set(sequence.generated)) >= 8 for sequence in checkpoint.quantized[kind])
    return checkpoint.quantized[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_quantized_cache_serves_the_fake_quantized_graph(saved: Callable, family: str, kind: str) -> None:
    """Law (e) for caches, over pages, chunked prefill and preemption. In fp64, where no last bit moves a code."""
    checkpoint = saved(family)
    sequences = quantized(checkpoint, kind)
    for shape in SHAPES if family == "llama" else SHAPES[3:]:
        llm = LLM(checkpoint.path, EngineConfig(**RESERVE, **shape, kv=kind, dtype="float64"))
        completions = llm.generate(PROMPTS, GREEDY)
        assert [c.token_ids for c in completions] == [s.generated for s in sequences]
        assert (llm.engine.scheduler.num_preemptions > 0) == ("num_blocks" in shape and shape["num_blocks"] == 26)
        llm.check_integrity()
    llm = LLM(
        checkpoint.path, EngineConfig(**RESERVE, block_size=4, max_num_batched_tokens=7, kv=kind, dtype="float64")
    )
    for prefill in (None, [len(prompt) for prompt in PROMPTS]):
        for scores, sequence in zip(
            llm.score([s.ids[:-1].tolist() for s in sequences], prefill), sequences, strict=True
        ):
            worst = float((scores - sequence.logits).abs().max())
            assert worst <= 1e-6 * float(sequence.logits.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_cache_in_fp32(saved: Callable, kind: str) -> None:
    """In so small a model a last bit decides about no code, so fp32 agrees as well as without."""
    checkpoint = saved("llama")
    sequences = quantized(checkpoint, kind)
    llm = LLM(checkpoint.path, EngineConfig(**RESERVE, block_size=4, kv=kind))
    assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == [s.generated for s in sequences]
    for scores, sequence in zip(llm.score([s.ids[:-1].tolist() for s in sequences]), sequences, strict=True):
        assert float((scores - sequence.logits).abs().max()) <= 1e-4 * float(sequence.logits.abs().max())
    plain = LLM(checkpoint.path, EngineConfig(**RESERVE, block_size=4))
    assert float((plain.score([PROMPTS[2]])[0] - llm.score([PROMPTS[2]])[0]).abs().max()) > 1e-2


def test_scores_beside_running_requests(saved: Callable) -> None:
    checkpoint = saved("llama")
    llm = LLM(checkpoint.path, EngineConfig(**RESERVE, block_size=4, num_blocks=20))
    ids = [llm.submit(prompt, GREEDY) for prompt in PROMPTS[:2]]
    tokens = {id: [] for id in ids}
    while llm.engine.has_unfinished():
        for delta in llm.step():
            tokens[delta.id] += delta.token_ids
        logits = checkpoint.logits(PROMPTS[0])
        torch.testing.assert_close(llm.score([PROMPTS[0]], [2])[0], logits, rtol=1e-4, atol=1e-3)
        llm.check_integrity()
    assert list(tokens.values()) == expected(checkpoint)[:2]
    with pytest.raises(ValueError, match="21 blocks of 4 tokens, and 20 are free"):
        llm.score([[1] * 79, [1]])
    with pytest.raises(ValueError, match="prefill=6"):
        llm.score([[1] * 5], [6])


@pytest.mark.parametrize("scheme", ["w4_g32", "w8_channel_asym"])
def test_the_fast_path_stays_close(saved: Callable, scheme: str) -> None:
    checkpoint = saved("llama", scheme)
    llm = LLM(checkpoint.path, EngineConfig(device="cpu", block_size=4))
    logits = checkpoint.logits(PROMPTS[2])
    scores = llm.score([PROMPTS[2]], [10])[0]
    assert float((scores - logits).norm() / logits.norm()) < 0.05
    assert llm.loaded.weight_bytes <= 1.1 * llm.loaded.file_bytes
    assert len(llm.generate(PROMPTS, GREEDY)[0].token_ids) == 32


def test_half_precision_activations(saved: Callable) -> None:
    checkpoint = saved("qwen3", "w4_g32")
    llm = LLM(checkpoint.path, EngineConfig(device="cpu", dtype="bfloat16", block_size=4))
    logits = checkpoint.logits(PROMPTS[2])
    assert llm.engine.runner.caches[0][0].data.dtype == torch.bfloat16
    assert float((llm.score([PROMPTS[2]], [10])[0] - logits).norm() / logits.norm()) < 0.1


@pytest.fixture
def llm(saved: Callable) -> LLM:
    return LLM(saved("llama").path, EngineConfig(**RESERVE, block_size=4, num_blocks=64))


def text_of(tokens: list[int], llm: LLM) -> str:
    return llm.tokenizer.decode(tokens)


def test_text_in_text_out(llm: LLM) -> None:
    (completion,) = llm.generate(["a prompt"], GREEDY)
    assert list(completion.prompt_token_ids) == llm.tokenizer.encode("a prompt")
    assert completion.text == text_of(completion.token_ids, llm)
    pieces = list(llm.stream("a prompt", GREEDY))
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 31 + ["length"]


def test_chat_goes_through_the_template(llm: LLM) -> None:
    completion = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=3))
    assert text_of(list(completion.prompt_token_ids), llm) == "<user>hi\n<assistant>"
    with pytest.raises(ValueError, match="messages: the chat template"):
        llm.chat([{"no": "role"}, 3])  # type: ignore[list-item]


def test_stop_strings_end_a_request(llm: LLM) -> None:
    (whole,) = llm.generate(["a prompt"], GREEDY)
    stop = whole.text[4:6]
    (cut,) = llm.generate(["a prompt"], SamplingParams(max_tokens=32, stop=[stop, "never said"]))
    assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.index(stop)])
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    llm.check_integrity()
    assert llm.engine.blocks.num_free == 64


def test_end_tokens_are_output_but_not_text(saved: Callable, tmp_path: Path) -> None:
    checkpoint = saved("llama")
    path = Path(shutil.copytree(checkpoint.path, tmp_path / "eos"))
    greedy = checkpoint.greedy(PROMPTS[0])
    for eos in (greedy[5], [greedy[5], 255]):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        ending = LLM(path, EngineConfig(**RESERVE))
        (completion,) = ending.generate([PROMPTS[0]], GREEDY)
        assert completion.token_ids == greedy[: greedy.index(greedy[5]) + 1]
        assert completion.text == text_of(completion.token_ids[:-1], ending)
        assert completion.finish_reason == "stop"
        (on,) = ending.generate([PROMPTS[0]], SamplingParams(max_tokens=32, ignore_eos=True))
        assert on.token_ids == greedy


def test_bad_prompts_are_named_and_nothing_is_queued(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt: empty"):
        llm.generate(["fine", "", "fine"], GREEDY)
    with pytest.raises(ValueError, match="prompt: text that cannot be encoded"):
        llm.generate(["\ud800"], GREEDY)
    with pytest.raises(ValueError, match="prompt of 200 tokens"):
        llm.stream([1] * 200, GREEDY)
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.submit("fine", SamplingParams(stop_token_ids=[256]))
    assert llm.engine.stats()["requests"] == 0
    llm.check_integrity()


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    llm.stream("never begun", GREEDY)
    first, second = llm.stream("a prompt", GREEDY), llm.stream("another", GREEDY)
    expected = [c.text for c in llm.generate(["a prompt", "another"], GREEDY)]
    heard = [next(first).text, next(second).text, next(first).text]  # interleaved
    first.close()
    heard += [delta.text for delta in second]
    assert expected[0].startswith(heard[0] + heard[2])
    assert "".join(heard[1:2] + heard[3:]) == expected[1]
    llm.check_integrity()
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats()["abort"] == 1
    assert not llm._inbox


def test_a_tokenizer_that_throws_ends_one_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [c.text for c in llm.generate(["one", "two", "three"], GREEDY)]
    decode = llm._decode

    def throw(tokens: list[int]) -> str:
        if llm.tokenizer.decode(tokens).startswith("two") and len(tokens) > 6:
            raise RuntimeError("a broken tokenizer")
        return decode(tokens)

    monkeypatch.setattr(llm, "_decode", throw)
    one, two, three = llm.generate(["one", "two", "three"], GREEDY)
    assert [one.text, three.text] == [expected[0], expected[2]]
    assert two.finish_reason == "error"
    assert "broken tokenizer" in two.message
    llm.check_integrity()
    assert llm.engine.blocks.num_free == 64


def test_aborts_through_the_text_layer(llm: LLM) -> None:
    id, other = llm.submit("a prompt", GREEDY), llm.submit("another", SamplingParams(max_tokens=4))
    llm.step()
    assert llm.abort(id)
    assert not llm.abort(id)
    while llm.engine.has_unfinished():
        assert {delta.id for delta in llm.step()} == {other}
        llm.check_integrity()


def test_token_ids_are_served_without_a_tokenizer(saved: Callable, tmp_path: Path) -> None:
    checkpoint = saved("llama")
    path = Path(shutil.copytree(checkpoint.path, tmp_path / "bare"))
    for file in path.glob("tokenizer*"):
        file.unlink()
    bare = LLM(path, EngineConfig(**RESERVE))
    (completion,) = bare.generate([PROMPTS[0]], GREEDY)
    assert completion.token_ids == checkpoint.greedy(PROMPTS[0])
    assert completion.text == ""
    for bad in (lambda: bare.generate(["text"]), lambda: bare.submit([1], SamplingParams(stop=["x"]))):
        with pytest.raises(ValueError, match="holds no tokenizer"):
            bad()


def test_logprobs_reach_the_completion(llm: LLM, saved: Callable) -> None:
    (completion,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=5, logprobs=2))
    logits = saved("llama").logits(PROMPTS[0] + completion.token_ids)[len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(5), completion.token_ids]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    assert [len(top) for top in completion.top_logprobs] == [2] * 5


def test_sampling_is_seeded_and_independent_of_neighbours(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3)
    (alone,) = llm.generate([PROMPTS[0]], params)
    beside = llm.generate(PROMPTS, params)
    assert beside[0].token_ids == alone.token_ids
    assert (
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=20, temperature=1.0, seed=4))[0].token_ids
        != alone.token_ids
    )


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], 1.0, True, [0, None], {"id": 0}], ids=repr)
def test_end_tokens_that_are_none_are_refused(saved: Callable, tmp_path: Path, eos: object) -> None:
    path = Path(shutil.copytree(saved("llama").path, tmp_path / "eos"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be an integer or a list of them"):
        LLM(path, EngineConfig(**RESERVE))
