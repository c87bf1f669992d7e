"""Answers of a required form over real HTTP: JSON of a schema, parsed by the official client."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.openai_calls import ask, official_client, text_of
from tests.running_server import RunningServer

pytest.importorskip("llguidance")


class Pet(BaseModel):
    """What the answer is to be."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)
    names: list[Literal["Tom", "Rex"]] = Field(max_length=2)


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with official_client(server) as found:
        yield found


def test_the_official_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    """A pydantic model goes out as a schema and comes back as an instance."""
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "Describe a pet."}],
        response_format=Pet,
        max_tokens=200,
    )

    assert isinstance(answer.choices[0].message.parsed, Pet)
    assert answer.choices[0].finish_reason == "stop"


def test_every_output_follows_streamed_or_not(client: openai.OpenAI) -> None:
    """Several random outputs of one prompt, each in its own place of the grammar."""
    options: dict[str, Any] = {
        "response_format": _format(Pet.model_json_schema()),
        "n": 3,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
    }
    whole = ask(client, **options)
    texts = ["", "", ""]
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "A pet?"}], stream=True, **options
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    answers = [*texts, *(choice.message.content or "" for choice in whole.choices)]
    pets = [Pet.model_validate_json(text) for text in answers]
    assert len(pets) == 6


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    """Any object will do; it may end before its time, but what is there begins one."""
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=300)

    assert text_of(answer).startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text_of(answer)), dict)


def test_text_is_what_it_is_without(client: openai.OpenAI) -> None:
    """The format `text` asks for nothing."""
    assert text_of(ask(client, response_format={"type": "text"})) == text_of(ask(client))


def test_the_token_that_ends_an_answer_is_not_reported(client: openai.OpenAI) -> None:
    """Tokens with probabilities add up to the text also where the answer ends by itself."""
    answer = ask(client, response_format=_format({"enum": ["yes"]}), logprobs=True)

    assert answer.choices[0].finish_reason == "stop"
    assert text_of(answer) == '"yes"'
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(one.token for one in logprobs.content or ()) == '"yes"'


@pytest.mark.parametrize(
    ("response_format", "word"),
    [
        (_format({"type": "wizard"}), "response_format cannot be followed"),
        (_format({"$ref": "#"}), "response_format cannot be followed"),
        ({"type": "json_schema"}, "json_schema is missing"),
        ({"type": "xml"}, "response_format.type"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    client: openai.OpenAI, response_format: dict[str, Any], word: str
) -> None:
    """400, before anything is computed."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=response_format)

    assert word in caught.value.message


def test_a_form_needs_an_end(client: openai.OpenAI) -> None:
    """ignore_eos and a grammar contradict each other."""
    with pytest.raises(openai.BadRequestError, match="lets no grammar end"):
        ask(client, response_format={"type": "json_object"}, extra_body={"ignore_eos": True})
