import os
import signal
import socket
import threading
import time

import httpx
import pytest

from qat.server import listen
from qat.server.app import create


def test_a_port_in_use_or_an_address_of_another_machine():
    with listen.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert listen.url(taken) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ValueError, match=rf"server.port={port}: cannot be used on 127.0.0.1 \(Address already in"):
            listen.bind("127.0.0.1", port)
    with listen.bind("127.0.0.1", port):
        pass
    with pytest.raises(ValueError, match=r"server.port=\d+: cannot be used on 192.0.2.1"):
        listen.bind("192.0.2.1", port)
    with pytest.raises(ValueError, match=r"server\.host=no such host: not an address"):
        listen.bind("no such host", 0)


def test_a_url_of_ipv6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        bound = listen.bind("::1", 0)
    except ValueError:
        pytest.skip("no IPv6 here")
    with bound:
        assert listen.url(bound) == f"http://[::1]:{bound.getsockname()[1]}/v1"


def test_signals():
    app = type("App", (), {"state": type("State", (), {"worker": None})})
    server = listen.Server(app, 1)
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, server.force_exit) == (True, False)
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, server.force_exit) == (True, True)


def test_run_returns_after_a_signal_and_everything_is_closed(build):
    """In this very process: a signal neither kills it nor leaves a thread behind."""
    app = create(build(), "tiny", 1)
    bound = listen.bind("127.0.0.1", 0)
    url = listen.url(bound)
    said = []

    def ask():
        while not said:
            try:
                said.append(httpx.post(url + "/completions", json={"model": "tiny", "prompt": "a"}, timeout=30))
            except httpx.ConnectError:
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    before = signal.getsignal(signal.SIGTERM)
    listen.run(app, bound, 5)
    asker.join()
    assert said[0].status_code == 200
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_a_second_signal_does_not_wait(build, slow):
    llm = build()
    slow(llm, 0.03)
    app = create(llm, "tiny", 1)
    bound = listen.bind("127.0.0.1", 0)
    bound.listen()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "stream": True, "ignore_eos": True}
    ended = []

    def ask():
        with httpx.stream("POST", listen.url(bound) + "/completions", json=body, timeout=30) as response:
            pieces = response.iter_text()
            next(pieces)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            assert next(pieces)
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                ended.append("".join(pieces))
            except httpx.HTTPError as error:
                ended.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    start = time.monotonic()
    listen.run(app, bound, 30)
    asker.join(5)
    assert time.monotonic() - start < 5
    assert len(ended) == 1
    assert "length" not in str(ended[0])
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
    llm.check_integrity()
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
