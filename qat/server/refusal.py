"""Refusals: every answer that is an error, in OpenAI's shape `{"error": {message, type, param, code}}`."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
HEADERS = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
WORDS = {
    "extra_forbidden": "this field is not served; leave it out",
    "missing": "is required",
    "json_invalid": "the body is not valid JSON",
}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: Of HTTP.
        message: For a person.
        param: The field of the request that is wrong, if it is one.
        code: A word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status, HEADERS.get(self.status))


def of_value(error: ValueError, fields: set[str]) -> Refusal:
    """A value that the engine cannot take; its message begins with a field's name."""
    match = re.match(r"\w+", str(error))
    name = match[0] if match else ""
    if name == "prompt" and "messages" in fields:
        name = "messages"
    return Refusal(400, str(error), name if name in fields else None)


def of_validation(error: RequestValidationError) -> Refusal:
    """A request that is not one: all that is wrong with it, and the field of the first."""
    lines, params = [], []
    for item in error.errors():
        place = [] if item["type"] == "json_invalid" else item["loc"][1:]  # the first word is `body`
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        text = WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
        lines.append(f"{where}: {text}" if where else f"{text}; send a JSON object, with its Content-Type")
        params.append(str(place[0]) if place else None)
    return Refusal(400, "; ".join(lines), params[0])


def install(app: FastAPI) -> None:
    """Makes every error of an application answer in this shape."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = f"{request.method} {request.url.path}: "
        response = Refusal(error.status_code, path + str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return Refusal(500, f"a defect of the server ({type(error).__name__}); its log has the traceback").response()
