"""The HTTP application: OpenAI's routes."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from qat.engine.llm import LLM
from qat.server.limit import BodyLimit
from qat.server.protocol import ChatRequest, CompletionRequest
from qat.server.refusal import Refusal, install
from qat.server.service import Service


def create(llm: LLM, name: str, max_queue: int) -> FastAPI:
    """The application. `app.state.worker` is its worker, which lives as long as the application's lifespan.

    Args:
        llm: The model; from here on nobody else drives it.
        name: What clients call it.
        max_queue: Prompts that are accepted beyond those that run at a time.
    """
    service = Service(llm, name, max_queue)
    worker = service.worker
    facts = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "qat"}
    facts["max_model_len"] = llm.engine.max_model_len

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await service.close()

    app = FastAPI(title=f"qat serves {name}", lifespan=lifespan)
    app.state.worker = worker
    app.add_middleware(BodyLimit)
    install(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if worker.failure or worker.closing:
            raise Refusal(503, worker.failure or "the server is shutting down")
        return {"status": "ok", "open": worker.num_open}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [facts]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return facts

    # Responses are made by the service: FastAPI has no shape to check them against.
    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await service.respond(request, body)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await service.respond(request, body)

    return app
