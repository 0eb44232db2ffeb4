import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from qat.server.protocol import ChatRequest, CompletionRequest
from qat.server.refusal import Refusal, install, of_validation, of_value


@pytest.mark.parametrize(
    ("message", "request_", "param"),
    [
        ("top_p=0: expected a probability", CompletionRequest, "top_p"),
        ("stop: '' is not a string", CompletionRequest, "stop"),
        ("prompt of 300 tokens: too long", CompletionRequest, "prompt"),
        ("prompt of 300 tokens: too long", ChatRequest, "messages"),
        ("messages: the chat template cannot", ChatRequest, "messages"),
        ("/some/path: holds no tokenizer", CompletionRequest, None),
        ("model_config is no field", CompletionRequest, None),
        ("", CompletionRequest, None),
    ],
)
def test_the_field_of_a_value(message, request_, param):
    refusal = of_value(ValueError(message), set(request_.model_fields))
    assert (refusal.status, refusal.param, str(refusal)) == (400, param, message)


def test_all_that_is_wrong_is_said_and_the_first_is_the_param():
    errors = [
        {"type": "missing", "loc": ("body", "model"), "msg": "Field required"},
        {"type": "extra_forbidden", "loc": ("body", "messages", 2, "colour"), "msg": "..."},
        {"type": "value_error", "loc": ("body", "n"), "msg": "Value error, 2 is too many"},
    ]
    refusal = of_validation(RequestValidationError(errors))
    assert str(refusal) == "model: is required; messages[2].colour: this field is not served; leave it out; " + (
        "n: 2 is too many"
    )
    assert refusal.param == "model"
    refusal = of_validation(RequestValidationError([{"type": "json_invalid", "loc": ("body", 17), "msg": "..."}]))
    assert refusal.param is None
    assert "not valid JSON" in str(refusal)


@pytest.fixture
def client():
    app = FastAPI()
    install(app)

    @app.get("/{kind}")
    def fail(kind: str):
        raise {
            "busy": Refusal(429, "later", code="queue_full"),
            "http": HTTPException(418, "a teapot", {"x-tea": "green"}),
            "defect": KeyError("secret"),
        }[kind]

    return TestClient(app, raise_server_exceptions=False)


def test_every_error_has_the_shape(client):
    response = client.get("/busy")
    assert response.status_code == 429
    assert response.json() == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert response.headers["retry-after"] == "1"
    response = client.get("/http")
    assert (response.status_code, response.headers["x-tea"]) == (418, "green")
    assert response.json()["error"]["message"] == "GET /http: a teapot"
    assert client.get("/a/b").json()["error"]["type"] == "not_found_error"


def test_a_defect_does_not_tell_the_client_what_only_the_log_should_hold(client):
    response = client.get("/defect")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "KeyError" in response.text
    assert "secret" not in response.text
