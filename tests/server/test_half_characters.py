"""JSON can write half a character, which is no text: refused, on every route that takes text."""

import httpx
import pytest

from tests.running_server import RunningServer

HALF = "harbour \\ud800 bell"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", f'{{"model": "tiny", "prompt": "{HALF}", "max_tokens": 1}}'),
        (
            "/v1/chat/completions",
            f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{HALF}"}}]}}',
        ),
        (
            "/v1/messages",
            f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{HALF}"}}], "max_tokens": 1}}',
        ),
        ("/v1/responses", f'{{"model": "tiny", "input": "{HALF}"}}'),
        ("/tokenize", f'{{"prompt": "{HALF}"}}'),
        ("/v1/cache/lookup", f'{{"prompt": "{HALF}"}}'),
    ],
)
def test_half_a_character_is_refused(server: RunningServer, path: str, body: str) -> None:
    """The error names what and where."""
    with server.client() as client:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400, answer.text
    assert "U+D800" in answer.json()["error"]["message"]


def test_errors_of_messages_have_the_id_where_their_client_looks(server: RunningServer) -> None:
    """Under both names."""
    with server.client() as client:
        answer: httpx.Response = client.post("/v1/messages", json={"model": "tiny"})

    assert answer.status_code == 400
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
