"""A body full of entries is refused by the first few: no error, no warning for each of millions."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kvkeep.server.cache_fields import read_cache_fields
from kvkeep.server.cache_schemas import PurgeRequest
from kvkeep.server.openai_schemas import ChatRequest, CompletionRequest
from kvkeep.server.responses_schemas import ResponsesRequest
from tests.running_server import RunningServer

MANY = 5000
TURN = [{"role": "user", "content": "a"}]


def bodies_of(document: Mapping[str, Any]) -> set[str]:
    """The names of the models that routes read from bodies."""
    refs = set()
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            refs |= {one["$ref"] for one in [schema, *schema.get("anyOf", ())] if "$ref" in one}
    return {ref.rpartition("/")[2] for ref in refs}


def models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All subclasses, of any depth."""
    for one in model.__subclasses__():
        yield one
        yield from models_below(one)


def unbounded(schema: object, place: str = "", *, is_checked: bool = False) -> Iterator[str]:
    """Where in a schema of pydantic's core a list, or an object with typed values, has no bounds."""
    if isinstance(schema, Mapping):
        kind = schema.get("type")
        if kind == "list" and not (schema.get("fail_fast") and "max_length" in schema):
            yield place
        if kind == "dict" and not is_checked:
            values = schema.get("values_schema", {"type": "any"})
            if values["type"] != "any":
                yield place
        for name, value in schema.items():
            if name not in ("metadata", "cls"):
                yield from unbounded(value, f"{place}.{name}", is_checked=kind == "function-before")
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from unbounded(value, place)


def test_every_list_of_every_body_is_bounded(server: RunningServer) -> None:
    """And ends at its first wrong entry."""
    with server.client() as client:
        names = bodies_of(client.get("/openapi.json").json())
    models = {one for one in models_below(BaseModel) if one.__module__.startswith("kvkeep.server.")}
    found = {one for one in models if one.__name__ in names}

    assert len(found) >= 10
    assert not [
        f"{model.__name__}{place}"
        for model in found
        for place in unbounded(model.__pydantic_core_schema__)
    ]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": "a", "stop": [0] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(n): "a" for n in range(MANY)}}),
        (CompletionRequest, {"prompt": "a", "kv_cache": {"tags": [0] * MANY}}),
        (ChatRequest, {"messages": TURN, "tools": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}] * 1_000_000}),
        (ResponsesRequest, {"input": "a", "metadata": {str(n): 0 for n in range(MANY)}}),
        (PurgeRequest, {"prefix": {"token_ids": [-1] * MANY}}),
        (PurgeRequest, {str(n): 0 for n in range(MANY)}),
    ],
)
def test_few_errors_are_made(model: type[BaseModel], body: dict[str, Any]) -> None:
    """What is right in itself but far too much is refused as well."""
    with pytest.raises(ValidationError) as failed:
        model.model_validate(body)

    assert failed.value.error_count() < 10


def test_unknown_fields_are_named_as_far_as_the_header_goes() -> None:
    """Each name costs a search for what was meant."""
    unknown = {f"unknown_{number}": 0 for number in range(MANY)}
    asked = CompletionRequest.model_validate({"prompt": "a", "kv_cache": unknown, **unknown})

    warnings = read_cache_fields(asked, {}).warnings

    assert 2 < len(warnings.texts) < 200
    assert "unknown_0" in warnings.headers()["X-KV-Warnings"]


def test_the_error_says_how_much_is_taken(server: RunningServer) -> None:
    """Both numbers, and the field."""
    with server.client() as client:
        asked = {"prompt": "a", "logit_bias": {str(n): 1 for n in range(MANY)}}
        biases = client.post("/v1/completions", json=asked)
        messages = client.post("/v1/chat/completions", json={"messages": TURN * 20_000})

    assert biases.status_code == messages.status_code == 400
    error = biases.json()["error"]
    assert error["param"] == "logit_bias"
    assert "5000" in error["message"]
    assert "4096" in error["message"]
    assert "16384" in messages.json()["error"]["message"]
