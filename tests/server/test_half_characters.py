"""JSON can write half a character, which is no text: refused, on every route that takes text."""

import json

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


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "field",
    ['"user": "\\ud800"', '"metadata": {"a": "\\ud83d\\ud83d"}', '"prompt_cache_key": "\\uDC00"'],
)
def test_half_a_character_is_refused_where_it_would_only_be_repeated(
    server: RunningServer, field: str, is_stream: bool
) -> None:
    """Before a stream begins, which could only be cut off."""
    stream = str(is_stream).lower()
    body = f'{{"input": "a", "max_output_tokens": 1, "stream": {stream}, {field}}}'
    with server.client() as client:
        answer = client.post(
            "/v1/responses", content=body, headers={"content-type": "Application/JSON"}
        )

    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("text", ["\\ud83d\\ude00", "\\\\ud800", "\\u00e9\\n", "é😀"])
def test_whole_characters_are_taken(server: RunningServer, text: str) -> None:
    """Pairs of halves, and what only looks like a half."""
    with server.client() as client:
        body = f'{{"prompt": "{text}"}}'.encode()
        answer = client.post(
            "/tokenize", content=body, headers={"content-type": "application/json"}
        )
        back = client.post("/detokenize", json={"tokens": answer.json()["tokens"]}).json()

    assert back["prompt"] == json.loads(body)["prompt"]


@pytest.mark.parametrize("body", [b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\xff"}'])
def test_a_body_that_is_no_unicode_is_refused(server: RunningServer, body: bytes) -> None:
    """The error says at which byte."""
    with server.client() as client:
        answer = client.post(
            "/tokenize", content=body, headers={"content-type": "application/json"}
        )

    assert answer.status_code == 400, answer.text
    assert "byte 12" in answer.json()["error"]["message"]


def test_errors_of_messages_have_the_id_where_their_client_looks(server: RunningServer) -> None:
    """Under both names."""
    with server.client() as client:
        answer: httpx.Response = client.post("/v1/messages", json={"model": "tiny"})

    assert answer.status_code == 400
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
