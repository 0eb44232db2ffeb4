"""A limit to the size of requests, so that no client can fill the memory."""

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 8 * 2**20  # bytes: some two million tokens


class BodyLimit:
    """ASGI middleware that refuses a request whose body is longer than `limit` bytes, before all of it is read."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                # FastAPI reads the body and lets this very exception through to its handlers.
                raise HTTPException(413, f"the body is longer than {self.limit} bytes")
            return message

        await self.app(scope, counted, send)
