from fastapi import FastAPI
from fastapi.testclient import TestClient

from qat.server.limit import BodyLimit


def test_a_body_up_to_the_limit_and_no_longer():
    app = FastAPI()
    app.add_middleware(BodyLimit, limit=12)

    @app.post("/")
    def size(body: dict) -> int:
        return len(body)

    client = TestClient(app, headers={"Content-Type": "application/json"})
    assert client.post("/", content=b'{"a": 12345}').json() == 1
    response = client.post("/", content=b'{"a": 123456}')
    assert response.status_code == 413
    assert "12 bytes" in response.text
