"""Plain completions over real HTTP: prompts of every kind, streams of several, probabilities, echo."""

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from openai.types import Completion

from tests.running_server import RunningServer

_PROMPTS = ["def add(a, b):", "Once upon a time", "import os\n"]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client, which does not try again."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-key", max_retries=0) as found:
        yield found


_Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def _complete(client: openai.OpenAI, prompt: _Prompt, **options: Any) -> Completion:
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**asked | options)
    assert isinstance(found, Completion)
    return found


def _ids(server: RunningServer, text: str) -> list[int]:
    return list(server.service.prompts.encode_text(text).ids)


def test_a_completion_has_the_fields_of_the_protocol(client: openai.OpenAI) -> None:
    """16 tokens by default, and counts with those of the cache."""
    found = client.completions.create(
        model="tiny", prompt=_PROMPTS[0], extra_body={"ignore_eos": True}
    )

    assert found.id.startswith("cmpl-")
    assert found.object == "text_completion"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 16
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_of_every_kind_say_the_same(server: RunningServer, client: openai.OpenAI) -> None:
    """Text, texts, ids, and lists of ids: each prompt has its choice, in order."""
    alone = [_complete(client, prompt).choices[0].text for prompt in _PROMPTS]
    ids = [_ids(server, prompt) for prompt in _PROMPTS]

    assert [choice.text for choice in _complete(client, _PROMPTS).choices] == alone
    assert [choice.text for choice in _complete(client, ids).choices] == alone
    assert _complete(client, ids[0]).choices[0].text == alone[0]


def test_counts_of_several_prompts_are_added_up(
    server: RunningServer, client: openai.OpenAI
) -> None:
    """Tokens of all prompts and outputs; indices go on from prompt to prompt."""
    found = _complete(client, _PROMPTS, n=2, seed=1, temperature=1.0)

    assert [choice.index for choice in found.choices] == [0, 1, 2, 3, 4, 5]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(_ids(server, prompt)) for prompt in _PROMPTS)


def test_streams_of_several_prompts_add_up_to_their_answers(client: openai.OpenAI) -> None:
    """Pieces arrive mixed, by index, and one last chunk has the counts of all."""
    whole = _complete(client, _PROMPTS)
    texts = ["", "", ""]
    usage = None

    stream = client.completions.create(
        model="tiny",
        prompt=_PROMPTS,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text

    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None
    assert usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_probabilities_have_tokens_and_places(client: openai.OpenAI) -> None:
    """Four lists of one length; each offset is where its token begins in the text."""
    found = _complete(client, _PROMPTS[0], logprobs=2).choices[0]

    logprobs = found.logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert logprobs.text_offset
    assert "".join(logprobs.tokens) == found.text
    for token, value, top, offset in zip(
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
        strict=True,
    ):
        assert found.text[offset:].startswith(token)
        assert max(top.values()) == top[token] == value


def test_an_echo_comes_before_the_text(server: RunningServer, client: openai.OpenAI) -> None:
    """The prompt, given as text or ids, begins the answer, streamed or not."""
    text = _complete(client, _PROMPTS[0]).choices[0].text

    echoed = _complete(client, _PROMPTS[0], echo=True).choices[0].text
    from_ids = _complete(client, _ids(server, _PROMPTS[0]), echo=True).choices[0].text
    stream = client.completions.create(
        model="tiny", prompt=_PROMPTS[0], max_tokens=8, temperature=0, echo=True, stream=True
    )

    assert echoed == _PROMPTS[0] + text
    assert from_ids == echoed
    assert "".join(chunk.choices[0].text for chunk in stream) == echoed


def test_ids_of_prompt_and_output_come_back_if_asked_for(
    server: RunningServer, client: openai.OpenAI
) -> None:
    """What was computed, token by token."""
    found = _complete(
        client, _PROMPTS[0], max_tokens=3, extra_body={"return_token_ids": True, "ignore_eos": True}
    )

    extra = found.choices[0].model_extra
    assert extra is not None
    assert extra["prompt_token_ids"] == _ids(server, _PROMPTS[0])
    assert len(extra["token_ids"]) == 3


def test_explain_has_a_report_for_each_prompt(client: openai.OpenAI) -> None:
    """One object for one prompt, a list for several."""
    extra = {"kv_cache": {"explain": True}}

    one = _complete(client, _PROMPTS[0], extra_body=extra).model_extra
    many = _complete(client, _PROMPTS, extra_body=extra).model_extra

    assert one is not None
    assert many is not None
    assert one["kv_cache"]["status"] == "miss"
    assert len(many["kv_cache"]) == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": ""}, "0 tokens"),
        ({"prompt": [999_999]}, "token id 999999"),
        ({"prompt": ["x"] * 200, "n": 100}, "outputs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_cannot_be_completed_is_refused(
    client: openai.OpenAI, options: dict[str, Any], word: str
) -> None:
    """400 that names what is wrong."""
    asked = {"prompt": "x", **options}

    with pytest.raises(openai.BadRequestError) as caught:
        _complete(client, **asked)

    assert word in caught.value.message


@pytest.mark.parametrize(("entry", "status"), [(-1, 400), ("x", 413), (None, 400)])
def test_a_million_wrong_entries_make_a_short_error(
    server: RunningServer, entry: object, status: int
) -> None:
    """The first one is enough; so many texts are not looked at."""
    with server.client() as plain:
        response = plain.post("/v1/completions", json={"prompt": [entry] * 1_000_000})

    assert response.status_code == status
    assert len(response.text) < 2_000
