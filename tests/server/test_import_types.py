"""A file of blocks may come under any content type: clients for JSON send theirs with everything."""

import pytest

from tests.running_server import RunningServer

_LAW = "A file of blocks is what it is, whatever the client that sends it calls it. " * 8


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", ""])
def test_a_file_is_taken_under_any_content_type(server: RunningServer, kind: str) -> None:
    """It is no text, and is not read as such; what is no file of blocks is refused as that."""
    headers = {"content-type": kind} if kind else {}
    with server.client() as client:
        body = {"prompt": _LAW, "max_tokens": 1, "kv_cache": {"session": "taken"}}
        client.post("/v1/completions", json=body).raise_for_status()
        file = client.post("/v1/cache/sessions/taken/export").raise_for_status().content
        answer = client.post("/v1/cache/import", content=file, headers=headers)
        refused = client.post("/v1/cache/import", content=b"\xff{}", headers=headers)

    assert answer.status_code == 200, answer.text
    assert answer.json()["present"] > 0
    assert refused.json()["error"]["code"] == "not_importable"
