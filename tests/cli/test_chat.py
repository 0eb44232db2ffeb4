"""qat chat, at the end of a pipe and in a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from tiny_export import export

from qat.cli import chat
from qat.cli.chat import Chat
from qat.cli.main import main
from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.llm import LLM

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "tiny"
    export(path, certified=False)
    return path


@pytest.fixture
def llm(path) -> LLM:
    return LLM(path, EngineConfig(device="cpu", block_size=4))


def talk(llm, params=GREEDY):
    return Chat(llm, params, StringIO(), StringIO())


def answer(llm, turns, params=GREEDY):
    return llm.chat(turns, params).text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_turns_build_on_each_other(llm):
    conversation = talk(llm)
    first = answer(llm, [user("one")])
    second = answer(llm, [user("one"), assistant(first), user("two")])
    assert second != answer(llm, [user("two")]), "the model must listen for this test to mean anything"
    conversation.say("one")
    conversation.say("two")
    assert conversation.out.getvalue() == f"{first}\n{second}\n"
    assert conversation.notes.getvalue() == ""
    assert [turn["content"] for turn in conversation.turns] == ["one", first, "two", second]


def test_the_oldest_turns_go_when_the_room_does(llm):
    conversation = talk(llm)
    for i in range(12):
        conversation.say(f"{i} {'x' * 30}")
    assert "oldest turns no longer fit and are forgotten" in conversation.notes.getvalue()
    assert conversation.turns[-2]["content"].startswith("11 ")
    assert conversation.turns[0]["role"] == "user"
    assert not conversation.turns[0]["content"].startswith("0 ")
    assert len(llm.encode_chat(conversation.turns)) <= 256
    assert len(conversation.out.getvalue().split("\n")) >= 13
    llm.check_integrity()


def test_a_turn_that_is_too_long_alone_is_refused_and_forgotten(llm):
    conversation = talk(llm)
    conversation.say("one")
    before = list(conversation.turns)
    conversation.say("x" * 300)
    assert "model length of 256" in conversation.notes.getvalue()
    assert conversation.turns == before
    conversation.say("x" * 200)  # leaves little room, but some
    assert len(conversation.turns) == 2


def test_an_answer_that_fails_is_no_turn(llm, monkeypatch):
    conversation = talk(llm)
    logits = llm.engine.runner.logits
    monkeypatch.setattr(llm.engine.runner, "logits", lambda hidden: logits(hidden) * float("nan"))
    conversation.say("one")
    assert "[the answer failed: the logits" in conversation.notes.getvalue()
    assert conversation.turns == []


def test_an_interrupt_stops_the_answer_and_nothing_else(llm):
    conversation = talk(llm, SamplingParams(max_tokens=200, ignore_eos=True))
    step, steps = llm.step, []

    def interrupting():
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step()

    llm.step = interrupting
    before = signal.getsignal(signal.SIGINT)
    conversation.say("one")
    assert len(steps) == 5
    assert signal.getsignal(signal.SIGINT) == before
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.out.getvalue() == conversation.turns[1]["content"] + "\n"
    llm.check_integrity()
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
    conversation.say("two")
    assert len(steps) > 100


def test_a_second_interrupt_does_not_wait_for_the_step():
    with chat.interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
        assert len(seen) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_at_the_end_of_a_pipe(path, llm, capsys, monkeypatch):
    """Answers and nothing else."""
    monkeypatch.setattr(sys, "stdin", StringIO("one\n\n/reset\n/what now\n one \n/exit\nnever\n"))
    assert main(["chat", str(path), "sampling.temperature=0", "sampling.max_tokens=12", "engine.device=cpu"]) == 0
    said = capsys.readouterr()
    first = answer(llm, [user("one")], SamplingParams(max_tokens=12))
    assert said.out == f"{first}\n{first}\n"
    assert "[the conversation is forgotten]" in said.err
    assert "[no command /what: /reset forgets" in said.err
    monkeypatch.setattr(sys, "stdin", StringIO("one"))
    assert main(["chat", str(path), "sampling.temperature=0", "sampling.max_tokens=12"]) == 0
    assert capsys.readouterr().out == f"{first}\n"


def test_a_checkpoint_that_cannot_chat_says_so_at_once(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("one\n"))
    for file in path.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["chat", str(tmp_path)]) == 1
    assert "chat template" in capsys.readouterr().err


@pytest.mark.whole
def test_in_a_terminal(path):
    """A prompt; Ctrl-C stops an answer, or drops a line; Ctrl-D leaves."""
    arguments = ["chat", str(path), "sampling.max_tokens=200", "threads=1", "engine.device=cpu"]
    code = (
        "import sys, time\n"
        "from qat.engine.llm import LLM\n"
        "from qat.cli.main import main\n"
        "step = LLM.step\n"
        "def slow(self):\n    time.sleep(0.05)\n    print('.', end='', flush=True)\n    return step(self)\n"
        "LLM.step = slow\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    said = ""

    def until(text, seconds=40):
        nonlocal said
        deadline = time.monotonic() + seconds
        while text not in said:
            assert select.select([master], [], [], max(0, deadline - time.monotonic()))[0], said
            said += os.read(master, 1000).decode(errors="replace")
        said = said.partition(text)[2]

    try:
        until("/reset forgets")
        until("> ")
        os.write(master, b"one\n")
        until("...")
        process.send_signal(signal.SIGINT)
        until("> ", 5)
        time.sleep(0.3)  # it reads by now; a signal just before that is noticed with the next line only
        process.send_signal(signal.SIGINT)
        until("> ")
        os.write(master, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
