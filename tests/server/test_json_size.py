"""Bodies of very many values are refused before they are parsed, on every route; long prompts are taken."""

import json

import pytest

from kvkeep.server.errors import ApiError
from kvkeep.server.json_size import check_num_values
from tests.running_server import RunningServer

MANY = 300_000
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/responses", '{"input":"a","reasoning":{"a":[%s[]]}}' % ("[]," * MANY)),
        ("/v1/completions", "{" + "".join(f'"u{n}":1,' for n in range(MANY)) + '"prompt":"a"}'),
        ("/v1/completions", '{"prompt":"a","user":{"a":[%s{}]}}' % ("{}," * MANY)),
        ("/v1/messages", '{"metadata":[%s""]}' % ('"",' * MANY)),
        ("/v1/completions", '{"prompt":"a","user":[%s1]}' % ("1," * 2_000_000)),
        ("/v1/cache/lookup", r'{"prompt":"a","user":[%s"\\"]}' % (r'"\\","\"",' * MANY)),
    ],
    ids=["lists", "fields", "objects", "texts", "numbers", "escapes"],
)
def test_a_body_of_very_many_values_is_refused(
    server: RunningServer, path: str, content: str
) -> None:
    """413, with the bound."""
    with server.client() as client:
        answer = client.post(path, content=content, headers=JSON)

    assert answer.status_code == 413, answer.text[:200]
    message = answer.json()["error"]["message"]
    assert "at most 250000 are taken" in message or "at most 2000000 are taken" in message


def test_a_million_token_ids_are_no_matter(server: RunningServer) -> None:
    """They are read, and judged by what the model takes."""
    with server.client() as client:
        ids = [1] * 1_000_000
        refused = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1})
        known = client.post("/v1/cache/lookup", json={"token_ids": ids[:2000]})

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert known.status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "[], {}, " * MANY,
        'He said "no", [then] {left}, ' * MANY,
        '\\", "[\\\\' * MANY,
        "\\",
        "",
    ],
    ids=["brackets", "quotes", "backslashes", "one backslash", "empty"],
)
def test_what_stands_in_a_text_is_not_counted(text: str) -> None:
    """However much of it looks like JSON."""
    check_num_values(json.dumps({"prompt": text, "stop": [text, "a" * MANY]}))


@pytest.mark.parametrize("text", ['"' * 7, '{"a', "[" * 10, '"' * (MANY + 1)])
def test_what_is_no_json_is_left_to_who_parses_it(text: str) -> None:
    """No error of its own."""
    check_num_values(text)


def test_texts_and_what_is_around_them_are_told_apart() -> None:
    """A quote behind an escaped backslash ends a text."""
    with pytest.raises(ApiError, match="names of fields, lists and objects"):
        check_num_values(json.dumps(["\\", [[]] * MANY, "\\"]))
