"""A socket, and an application behind it until a signal comes."""

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

FLUSH = 5.0  # seconds that answers which were cut short have to reach their clients


class Server(uvicorn.Server):
    """Uvicorn, but a signal means: take no more, finish what runs, and return as any function does.

    Args:
        app: Made by `app.create`.
        drain_seconds: What runs has so long to finish.
    """

    def __init__(self, app: FastAPI, drain_seconds: float):
        self._worker, self._drain_seconds = app.state.worker, drain_seconds
        wait = int(drain_seconds + FLUSH) + 1
        # No log_config: messages go where the process's own do.
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=wait))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks to finish; the second one, not to wait."""
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains the worker, then closes."""
        self._worker.drain(self._drain_seconds)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet; port 0 is any that is free.

    Raises:
        ValueError: The address cannot be had; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"server.host={host}: not an address of this machine ({error.strerror})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"server.port={port}: cannot be used on {host} ({error.strerror}); choose another") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where the API is."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def run(app: FastAPI, bound: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT, and then until what runs has ended."""
    try:
        Server(app, drain_seconds).run([bound])
    finally:
        app.state.worker.close()
