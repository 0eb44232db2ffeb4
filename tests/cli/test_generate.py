"""Sequence k is a function of the seed and k; interrupted and resumed is unbroken; and what comes out trains."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_run import arguments

from qat.cli import generate
from qat.cli.main import main
from qat.data.text import load
from qat.engine.config import EngineConfig
from qat.engine.llm import LLM
from qat.models import hf

pytestmark = pytest.mark.whole

SIZES = ("device=cpu", "tokens=1500", "length=24", "sequences=16", "min_distinct=0.1")


@pytest.fixture
def made(root, tmp_path, capsys):
    """Runs `qat generate` into a directory of this name: its status, its tokens and what it printed."""

    def go(name, *more):
        command = ["generate", "model=hf", "model.name=tiny", f"model.path={root / 'model'}", *SIZES, *more]
        status = main([*command, f"out={tmp_path / name}"])
        out, err = capsys.readouterr()
        return status, load(tmp_path / name) if status == 0 else None, out + err

    return go


@pytest.fixture(scope="module")
def llm(root):
    config = EngineConfig(block_size=8, num_blocks=300, max_num_batched_tokens=99, max_model_len=24, device="cpu")
    return LLM(root / "model", config)


def config(**changes):
    sampling = {"greedy_tokens": 4, "temperature": 1.0, "top_p": 1.0}
    return {"length": 24, "sequences": 16, "seed": 1234, "sampling": sampling} | changes


def lists(sequences):
    return [tokens.tolist() for tokens in sequences]


def test_a_sequence_is_a_function_of_seed_and_index(llm):
    whole = lists(generate.sequences(llm, config(), 0, 20))
    assert lists(generate.sequences(llm, config(), 13, 3)) == whole[13:16]
    assert whole == lists(generate.sequences(llm, config(), 0, 20))
    other = lists(generate.sequences(llm, config(seed=1235), 0, 20))
    assert [tokens[0] for tokens in other] != [tokens[0] for tokens in whole]
    assert len({tuple(tokens) for tokens in whole}) == 20
    assert max(map(len, whole)) == 24
    assert 0 not in [token for tokens in whole for token in tokens]  # eos ends a sequence and is no part of it
    assert min(map(len, whole)) < 24


def test_the_mix_is_that_of_the_paper(llm, root):
    """A start token, then the likeliest ones by transformers' own decoding, then others than those."""
    model, _ = hf.load("tiny", str(root / "model"))
    drawn = 0
    for tokens in lists(generate.sequences(llm, config(), 0, 12)):
        logits = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert tokens[1:5] == logits[: len(tokens[1:5])]
        drawn += tokens[5:] != logits[4:-1]
    assert drawn > 6


def test_sequences_that_begin_alike_go_on_differently(llm):
    words = len(llm.tokenizer) - 1
    starts = generate.start_tokens(llm, 1234, 0, 2 * words).tolist()
    alike = [(i, starts.index(starts[i], words)) for i in range(6)]
    pairs = [[lists(generate.sequences(llm, config(), i, 1))[0] for i in pair] for pair in alike]
    assert all(a[:5] == b[:5] for a, b in pairs)
    assert sum(a != b for a, b in pairs) > 3


def test_rounds_begin_with_every_word_once(llm):
    words = len(llm.tokenizer) - 1
    starts = generate.start_tokens(llm, 7, 0, 3 * words).tolist()
    for round in range(3):
        assert sorted(starts[round * words : (round + 1) * words]) == list(range(1, words + 1))
    assert starts[:words] != starts[words : 2 * words]
    assert generate.start_tokens(llm, 7, words - 5, 20).tolist() == starts[words - 5 : words + 15]
    assert generate.start_tokens(llm, 8, 0, words).tolist() != starts[:words]


def test_a_sequence_begins_with_a_piece_of_the_text(llm, root):
    """Which no document ends in, another one for each index; and the model goes on as it would from there."""
    text = np.asarray(load(root / "tokens").streams["train"]).copy()
    text[::9] = 0
    prompted = config(prompt={"path": "somewhere", "tokens": 6})
    whole = lists(generate.sequences(llm, prompted, 0, 20, text))
    everywhere = {tuple(text[i : i + 6].tolist()) for i in range(len(text) - 5)}
    begun = [tuple(tokens[:6]) for tokens in whole]
    assert set(begun) <= everywhere
    assert 0 not in [token for tokens in whole for token in tokens]
    assert len(set(begun)) > 15
    assert max(map(len, whole)) == 24
    assert lists(generate.sequences(llm, prompted, 13, 3, text)) == whole[13:16]
    model, _ = hf.load("tiny", str(root / "model"))
    likely = model(torch.tensor([whole[0]])).logits[0].argmax(-1).tolist()
    assert whole[0][6:10] == likely[5:9]
    with pytest.raises(ValueError, match=r"prompt\.tokens=9: no document"):
        generate.sequences(llm, config(prompt={"path": "somewhere", "tokens": 9}), 0, 2, text)


def test_a_text_to_begin_with_shows_in_the_settings_and_is_of_the_same_tokenizer(made, root, tmp_path):
    _, plain, _ = made("text")
    _, tokens, said = made("prompted", f"prompt.path={root / 'tokens'}", "prompt.tokens=8")
    assert tokens.fingerprint != plain.fingerprint, said
    manifest = json.loads((tmp_path / "prompted" / "manifest.json").read_text())
    fingerprint = load(root / "tokens").fingerprint
    assert manifest["source"]["settings"]["prompt"] == {"data": fingerprint, "tokens": 8}
    train, begun = load(root / "tokens").streams["train"].tolist(), tokens.streams["train"][:8].tolist()
    assert any(train[i : i + 8] == begun for i in range(len(train)))
    shutil.copytree(root / "tokens", tmp_path / "other")
    text = (tmp_path / "other" / "manifest.json").read_text()
    (tmp_path / "other" / "manifest.json").write_text(text.replace(tokens.tokenizer, "0" * 64))
    status, _, said = made("text", f"prompt.path={tmp_path / 'other'}", "prompt.tokens=8")
    assert status == 1
    assert "made with another tokenizer" in said


def test_resumed_is_unbroken(made, tmp_path, monkeypatch):
    _, unbroken, _ = made("unbroken")
    save_shard, calls = generate.generated.save_shard, []

    def cut(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[1])
        save_shard(*arguments)

    monkeypatch.setattr(generate.generated, "save_shard", cut)
    status, _, said = made("resumed")
    assert status == 130
    assert "the same command goes on from there" in said
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(generate.generated, "save_shard", lambda *a: (calls.append(a[1]), save_shard(*a)))
    status, resumed, said = made("resumed")
    assert status == 0
    assert "resumed after 32 sequences" in said
    assert calls[:3] == [0, 16, 32]  # nothing twice
    assert resumed.fingerprint == unbroken.fingerprint
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("resumed", "unbroken")]
    assert manifests[0] == manifests[1]
    assert 1500 <= sum(map(len, resumed.streams.values())) < 1500 + 25


def test_the_batch_does_not_decide_what_is_said(made):
    """In fp32, where rounding is far below what a draw can see."""
    assert made("narrow", "sequences=5")[1].fingerprint == made("wide", "sequences=64")[1].fingerprint


def test_every_setting_shows_in_the_fingerprint_and_is_held_to(made):
    _, first, _ = made("text")
    changes = ["seed=5", "length=20", "sampling.temperature=0.9", "sampling.greedy_tokens=3", "sampling.top_p=0.9"]
    for number, change in enumerate(changes):
        assert made(f"changed{number}", change)[1].fingerprint != first.fingerprint, change
        status, _, said = made("text", change)
        assert status == 1
        assert f"made with {change.partition('=')[0].partition('.')[0]}=" in said


def test_another_model_is_refused(made, root, tmp_path):
    made("text")
    model, tokenizer = hf.load("tiny", str(root / "model"))
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    status, _, said = made("text", f"model.path={tmp_path / 'model'}")
    assert status == 1
    assert "made with model=" in said


def test_finished_is_found_again(made, monkeypatch):
    _, first, said = made("text")
    assert "tokens/s" in said
    monkeypatch.setattr(generate, "LLM", None)
    status, again, said = made("text")
    assert status == 0
    assert again.fingerprint == first.fingerprint
    assert "is finished" in said
    assert "qat run data=generated data.path=" in said


def test_the_manifest_says_how(made, tmp_path):
    _, tokens, said = made("text", "min_distinct=0.9", "sampling.temperature=0.05")
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
    settings, counts = manifest["source"]["settings"], manifest["source"]["counts"]
    assert settings["sampling"] == {"greedy_tokens": 4, "temperature": 0.05, "top_p": 1.0}
    assert (settings["seed"], settings["length"], settings["device"]) == (1234, 24, "cpu")
    assert settings["tokenizer"] == manifest["tokenizer"] == tokens.tokenizer
    assert len(settings["model"]) == 64
    assert counts["degenerate"] > 0
    eos = sum(int((stream == 0).sum()) for stream in tokens.streams.values())
    assert counts["sequences"] == eos
    assert f"{eos} sequences" in said


def test_what_repeats_itself_comes_to_an_end(made):
    """Greedy text has one sequence for each start token, and no more."""
    status, _, said = made("text", "tokens=100000", "sampling.temperature=0", "sequences=255", "length=8")
    assert status == 1
    assert "sequences 255 to 509 is new" in said
    assert "255 duplicates" in said


def test_what_cannot_be_is_refused_first(made, monkeypatch):
    for change, status, words in [
        ("length=1000", 2, "length: 1000 tokens, but the model's context ends at 256"),
        ("sampling.greedy_tokens=23", 2, "none would be drawn"),
        ("splits.test=0.95", 2, "leave some for training"),
        ("sampling.temperature=-1", 2, "sampling.temperature"),
        ("tokens=0", 2, "tokens: expected an integer"),
        ("prompt.path=/nowhere", 2, "prompt.path: /nowhere is no directory"),
        ("prompt={path: /tmp, tokens: 24}", 2, "prompt.tokens: 24 of the 24 tokens"),
        ("prompt={path: /tmp, tokens: 20}", 2, "4 of the 4 tokens after the beginning"),
    ]:
        found, _, said = made("text", change)
        assert (found, words in said) == (status, True), said


def test_a_family_that_is_not_served_is_refused_before_it_is_written(made, monkeypatch):
    monkeypatch.setattr(generate, "ARCHITECTURES", {"OtherForCausalLM": None})
    monkeypatch.setattr(generate, "write_directory", None)
    status, _, said = made("text")
    assert status == 1
    assert "the engine does not serve LlamaForCausalLM; it has OtherForCausalLM" in said


def test_a_failure_of_the_engine_is_said(made, monkeypatch, tmp_path):
    def fail(self, chunks):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("qat.engine.model_runner.ModelRunner.forward", fail)
    status, _, said = made("text")
    assert status == 1
    assert "sequences=16: out of memory: no room; where memory is short, lower it" in said
    assert not (tmp_path / "text").exists()


def test_a_run_is_named_only_where_there_is_text_to_judge_it_on(made):
    assert "Next:\n  qat run data=generated" in made("enough", "splits={validation: 0.2, test: 0.2}")[2]
    said = made("few", "splits={validation: 0.2, test: 0.0001}")[2]
    assert "Nothing is in test, so no run can be judged on it" in said
    assert "Next" not in said


def test_a_generated_directory_trains(made, root, tmp_path, capsys):
    """`qat train data=generated data.path=DIR`, alone and beside other text."""
    made("text", "tokens=2500", "splits={validation: 0.2, test: 0.2}")
    path = tmp_path / "text"
    alone = (f"data.path={path}", "data=generated", f"runs={tmp_path / 'runs'}")
    assert main(arguments(root, "train", *alone)) == 0
    mixed = (f"data.extra=[{path}]", f"runs={tmp_path / 'mixed'}")
    assert main(arguments(root, "train", "dry_run=true", *mixed)) == 0
    facts = [
        json.loads((tmp_path / run).read_text())["data"]
        for run in (*("runs/latest/run.json", next((tmp_path / "mixed").rglob("run.json"))),)
    ]
    assert facts[0]["fingerprint"] == load(path).fingerprint
    assert facts[1]["fingerprint"] not in (load(path).fingerprint, load(root / "tokens").fingerprint)
    capsys.readouterr()
    shutil.rmtree(path)
    assert main(arguments(root, "train", *mixed)) == 2
    assert "data.extra:" in capsys.readouterr().err


def test_without_a_path_the_command_is_named(root, capsys):
    assert main(arguments(root, "train", "data=generated", "data.path=null")) == 2
    assert "`qat generate out=DIR` makes one" in capsys.readouterr().err


def test_the_teacher_is_the_full_precision_arm(root):
    """What is served is the model rounded to the storage dtype, found again by its fingerprint."""
    named = {"name": "tiny", "path": str(root / "model"), "revision": None}
    settings = {"model": named, "export": {"dtype": "float16"}, "length": 24}
    path, digest, sha = generate.teacher(settings)
    assert generate.teacher(settings) == (path, digest, sha)
    model, _ = hf.load("tiny", str(root / "model"), dtype=torch.float16)
    llm = LLM(path, EngineConfig(device="cpu", kernel="reference"))
    assert llm.loaded.config.dtype == torch.float16
    (logits,) = llm.score([[5, 6, 7]])
    expected = model(torch.tensor([[5, 6, 7]])).logits[0]
    assert np.allclose(logits, expected.detach(), atol=1e-4)
    assert generate.teacher(settings | {"export": {"dtype": "bfloat16"}})[0] != path
