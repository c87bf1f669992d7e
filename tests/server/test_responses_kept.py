"""What is kept of responses: little, of all tenants, and nothing of one who is erased."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvkeep.config import SamplingParams
from kvkeep.server.responses_fields import echoed_fields
from kvkeep.server.responses_history import KeptResponse, ResponseHistory
from kvkeep.server.responses_schemas import ResponsesRequest
from tests.running_server import RunningServer, running_server

ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
TEXT = "The treasure lies under the old oak behind the mill. " * 8
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants and an administrator."""
    with running_server(api_keys=(ANNA, BERT), admin_key=ADMIN) as running:
        yield running


@pytest.fixture
def anna(server: RunningServer) -> Iterator[httpx.Client]:
    """Who has the first key."""
    with server.client(ANNA) as client:
        yield client


def ask(client: httpx.Client, prompt: str = "Hello", **fields: Any) -> httpx.Response:
    """A request for a response of one token."""
    # Not every JSON can be written by the client's own encoder.
    body = json.dumps({"input": prompt, "max_output_tokens": 1, **fields})
    headers = {"content-type": "application/json"}
    return client.post("/v1/responses", content=body, headers=headers)


def made(client: httpx.Client, prompt: str = "Hello", **fields: Any) -> dict[str, Any]:
    """A response that was made."""
    answer = ask(client, prompt, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def kept(response_id: str, num_bytes: int) -> KeptResponse:
    """A response of about so many bytes, in a session of its own."""
    return KeptResponse(
        response={"id": response_id},
        messages=[{"role": "user", "content": "x" * num_bytes}],
        session=response_id,
        salt=None,
        owns_session=True,
    )


def test_who_has_most_makes_room() -> None:
    """However much one tenant keeps, what others have stays, and so do their conversations."""
    history = ResponseHistory(max_bytes=10_000)
    history.keep("bert", kept("resp_b", 1000))
    for number in range(50):
        history.keep("anna", kept(f"resp_{number}", 3000))
    history.keep("anna", kept("resp_more_than_all", 20_000))

    assert history.find("bert", "resp_b") is not None
    assert "resp_b" not in {one.session for one in history.take_ended()}
    assert history.num_bytes <= 10_000


def test_room_of_one_tenant_is_of_use_to_another() -> None:
    """Of two who have as much as they can, each has about half."""
    history = ResponseHistory(max_bytes=10_000)
    for owner in ("anna", "bert"):
        for number in range(20):
            history.keep(owner, kept(f"resp_{number}", 900))

    for owner in ("anna", "bert"):
        own = [number for number in range(20) if history.find(owner, f"resp_{number}")]
        assert own == list(range(20 - len(own), 20))
        assert 4 <= len(own) <= 6


def test_only_what_is_known_is_echoed(anna: httpx.Client) -> None:
    """Fields of objects that no server has read would be kept in memory for nothing."""
    waste = {"x": "y" * 1000}
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "name": "empty", "schema": schema, "strict": True}
    for given, echoed in (
        ({"text": {"format": {"type": "text"}, **waste}}, {"text": {"format": {"type": "text"}}}),
        ({"text": {"format": {"type": "text", **waste}}}, {"text": {"format": {"type": "text"}}}),
        ({"text": {"format": form | waste, **waste}}, {"text": {"format": form}}),
        ({"tools": [TOOL | waste], "tool_choice": "none"}, {"tools": [TOOL]}),
    ):
        response = made(anna, **given)
        assert {name: response[name] for name in echoed} == echoed
        read = anna.get(f"/v1/responses/{response['id']}").json()
        assert {name: read[name] for name in echoed} == echoed


def test_of_a_chosen_tool_its_name_is_echoed() -> None:
    """Whichever way it is chosen."""
    choice = {"type": "function", "name": "add"}
    for given, echoed in ((choice | {"x": "y"}, choice), ("required", "required"), (None, "auto")):
        fields = {"input": "Hello", "tools": [TOOL], "tool_choice": given}
        body = ResponsesRequest.model_validate(fields)

        assert echoed_fields(body, SamplingParams())["tool_choice"] == echoed


def test_labels_of_responses_are_short(anna: httpx.Client) -> None:
    """Metadata as the protocol bounds it; the error names the field and the bound."""
    most = {f"{'n' * 62}{number:02}": "v" * 512 for number in range(16)}
    assert made(anna, metadata=most)["metadata"] == most

    wrong: tuple[tuple[str, Any], ...] = (
        ("metadata", most | {"more": "v"}),
        ("metadata", {"n" * 65: "v"}),
        ("metadata.n", {"n": "v" * 513}),
        ("user", "u" * 513),
        ("safety_identifier", "u" * 513),
        ("prompt_cache_key", "u" * 513),
    )
    for field, given in wrong:
        answer = ask(anna, **{field.partition(".")[0]: given})
        assert answer.status_code == 400
        assert field in answer.json()["error"]["message"]
        assert "give at most" in answer.json()["error"]["message"]


def test_numbers_without_end_are_read_as_they_were_answered(anna: httpx.Client) -> None:
    """Whatever a schema holds, a response that was given can be read again."""
    tool = TOOL | {"parameters": {"type": "object", "properties": {"a": {"maximum": 1e999}}}}

    text = {"format": {"type": "text"}, "x": 1e999}
    response = made(anna, tools=[tool], tool_choice="none", text=text)
    read = anna.get(f"/v1/responses/{response['id']}")

    assert read.status_code == 200
    assert read.headers["content-type"] == "application/json"
    assert read.json() == response
