"""Requests with a wrong field, path or method are answered with its value and with what would be right."""

import json
from typing import Any

import pytest

from tests.running_server import RunningServer

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def told(server: RunningServer, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The error that the server answers with, and its status."""
    with server.client() as client:
        response = client.request(method, path, **request)
    assert response.is_error
    return {**response.json()["error"], "status": response.status_code, **response.headers}


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (CHAT, {"messages": HI, "temperature": "hot"}, "temperature='hot' should be a valid number", 0),
        (CHAT, {"messages": HI, "temperature": [1]}, "temperature is a list and should be a valid", 0),
        (CHAT, {"message": HI}, "messages is missing; the request needs it", 0),
        (CHAT, {"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role='wizard' should be", 0),
        (CHAT, {"messages": HI, "n": 0}, "n=0 should be greater than", 0),
        (CHAT, [], "the body is a list and should be", None),
        ("/v1/cache/purge", {"tag": "a"}, "tag is no field of this request; did you mean tags?", 0),
        (
            "/v1/cache/purge",
            {"prefix": {"prompts": "a"}},
            "prefix.prompts is no field of this request; did you mean prompt?",
            0,
        ),
        ("/v1/completions", {"prompt": "a", "stop": 3}, "stop=3 should be a valid string or a valid list", 0),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_a_remedy(
    server: RunningServer, path: str, body: object, message: str, param: int | None
) -> None:
    """`param` is the path of the field as the client wrote it, without names of types."""
    headers = {"content-type": "application/json"}
    found = told(server, "POST", path, content=json.dumps(body), headers=headers)

    assert found["status"] == 400
    assert found["message"].startswith(message)
    expected = None if param is None else message.partition(" ")[0].partition("=")[0]
    assert found["param"] == expected


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"messages": [,]}', "application/json", "the body is no JSON: "),
        ('{"messages": []}', "text/plain", "the body is not read as JSON; send content-type: "),
        ("", "application/json", "the body is missing"),
    ],
)
def test_a_body_that_cannot_be_read_has_no_param(
    server: RunningServer, content: str, kind: str, message: str
) -> None:
    """The place of a fault of JSON is a character, no field."""
    found = told(server, "POST", CHAT, content=content, headers={"content-type": kind})

    assert found["message"].startswith(message)
    assert found["param"] is None
    assert found["status"] == 400


def test_a_wrong_parameter_of_a_query_is_named(server: RunningServer) -> None:
    """As fields of a body are."""
    found = told(server, "GET", "/v1/cache/entries?limit=x&sorted=bytes")

    assert found["message"].startswith("limit='x' should be a valid integer")
    assert "sorted is no field of this request; did you mean sort?" in found["message"]
    assert found["param"] == "limit"


@pytest.mark.parametrize(
    ("method", "path", "remedy"),
    [
        ("POST", "/chat/completions", "it is /v1/chat/completions: end the client's base URL with /v1"),
        ("POST", "/v1/v1/messages", "it is /v1/messages: leave /v1 out of the client's base URL"),
        ("GET", "/v1/cache/session", "did you mean /v1/cache/sessions?"),
        ("GET", "/v1", "GET / says what there is"),
        ("GET", "/quite/elsewhere", "GET / says what there is"),
    ],
)  # fmt: skip
def test_an_unknown_path_is_named_with_the_one_that_was_meant(
    server: RunningServer, method: str, path: str, remedy: str
) -> None:
    """A base URL without /v1, or with it twice, is the usual mistake."""
    found = told(server, method, path)

    assert found["status"] == 404
    assert found["message"].startswith(f"there is no {method} {path}; ")
    assert remedy in found["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", "/v1/cache/contexts", "GET, POST"),
        ("POST", "/openapi.json", "GET"),
    ],
)
def test_a_wrong_method_is_answered_with_the_right_ones(
    server: RunningServer, method: str, path: str, allow: str
) -> None:
    """In the message and in the header."""
    found = told(server, method, path)

    assert found["status"] == 405
    assert found["message"] == f"{path} does not take {method}; send {found['allow']}"
    assert set(allow.split(", ")) <= set(found["allow"].split(", "))


def test_the_root_says_what_this_is(server: RunningServer) -> None:
    """With the model, the documents, and paths that there are."""
    with server.client() as client:
        found = client.get("/").json()
        described = client.get(found["openapi"])

    assert found["name"] == "kvkeep"
    assert found["model"] == "tiny"
    assert CHAT in found["paths"]
    assert described.status_code == 200
