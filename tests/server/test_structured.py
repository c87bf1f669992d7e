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


_BOMB = {"type": "string", "allOf": [{"pattern": f".*a.{{{n}}}b.*"} for n in range(1, 40)]}
_EXCLUSIVE = {"type": "object", "patternProperties": {f"^k{n}x$": {} for n in range(5000)}}
# What is too much here shows behind the value of `a`, which nothing but the output decides.
_LATE = {
    "type": "object",
    "properties": {
        "a": {"type": "boolean"},
        "b": {"type": "string", "pattern": "^(" + r"\p{L}{0,50}x?" * 2000 + ")*$"},
    },
    "required": ["a", "b"],
}


@pytest.mark.parametrize(
    ("schema", "word"),
    [(_BOMB, "39 patterns and formats that one string"), (_EXCLUSIVE, "making its grammar takes")],
)
def test_a_form_that_would_take_for_ever_is_refused_and_others_go_on(
    client: openai.OpenAI, schema: dict[str, Any], word: str
) -> None:
    """400, whether it is told by looking at it or by trying it."""
    with pytest.raises(openai.BadRequestError, match=f"response_format .*{word}"):
        ask(client, response_format=_format(schema))

    z = {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}
    assert text_of(ask(client, response_format=_format(z))).startswith('{"z": ')


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"property_{n}": {"type": "integer"} for n in range(1500)}},
        {"anyOf": [{"properties": {"a": {}, f"b{n}": {"type": "null"}}} for n in range(400)]},
    ],
)
def test_a_wide_form_is_followed(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    """Many optional properties, and many alternatives."""
    wide = {"type": "object", "minProperties": 0, **schema}
    answer = ask(client, response_format=_format(wide), max_tokens=30)

    assert text_of(answer).startswith("{")


def test_a_form_that_turns_out_too_much_ends_its_request_with_the_reason(
    client: openai.OpenAI,
) -> None:
    """It is the client's form, no failure of the model; a stream says so too, and others go on."""
    form: dict[str, Any] = {"response_format": _format(_LATE), "max_tokens": 60}
    with pytest.raises(openai.BadRequestError, match="followed any further: lexer error") as caught:
        ask(client, **form)
    assert caught.value.code == "form_too_complex"

    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "A?"}], stream=True, **form
    )
    with pytest.raises(openai.APIError, match="followed any further: lexer error"):
        list(stream)
    assert text_of(ask(client, response_format=_format({"enum": ["yes"]}))) == '"yes"'


def test_a_form_needs_an_end(client: openai.OpenAI) -> None:
    """ignore_eos and a grammar contradict each other."""
    with pytest.raises(openai.BadRequestError, match="lets no grammar end"):
        ask(client, response_format={"type": "json_object"}, extra_body={"ignore_eos": True})
