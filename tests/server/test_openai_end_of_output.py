"""What ends an output, and what may not yet: fields of completions and chats over real HTTP."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.openai_calls import ask, official_client, text_of, usage_of
from tests.running_server import RunningServer

_EOS, _IM_START = (
    "4",
    "3",
)  # of the bundled model: <|im_end|>, which ends an answer, and <|im_start|>
_PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with official_client(server) as found:
        yield found


def _completion(client: openai.OpenAI, **options: Any) -> openai.types.Completion:
    asked: dict[str, Any] = {"model": "tiny", "prompt": _PROMPT, "temperature": 0}
    found = client.completions.create(**asked | {"max_tokens": 12} | options)
    assert isinstance(found, openai.types.Completion)
    return found


def test_an_output_has_at_least_as_many_tokens_as_asked_for(client: openai.OpenAI) -> None:
    """Even where its end is by far the most likely token; then it ends."""
    bias = {"logit_bias": {_EOS: 100}}

    soon = _completion(client, **bias)
    later = _completion(client, **bias, extra_body={"min_tokens": 7})
    chat = ask(client, **bias, extra_body={"min_tokens": 7})

    assert soon.usage is not None
    assert soon.usage.completion_tokens == 1
    assert later.usage is not None
    assert later.usage.completion_tokens == usage_of(chat).completion_tokens == 8
    assert later.choices[0].finish_reason == chat.choices[0].finish_reason == "stop"


def test_stop_texts_wait_for_the_least_number_of_tokens(client: openai.OpenAI) -> None:
    """They are text until then, in a stream as well."""
    whole = _completion(client).choices[0].text
    stop = whole[:2]
    assert whole.count(stop) == 1
    extra: Any = {"stop": stop, "extra_body": {"min_tokens": 12}}

    stopped = _completion(client, stop=stop).choices[0].text
    kept = _completion(client, **extra).choices[0].text
    stream = client.completions.create(
        model="tiny", prompt=_PROMPT, temperature=0, max_tokens=12, stream=True, **extra
    )

    assert stopped == ""
    assert kept == whole
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_special_tokens_are_shown_to_those_who_ask(client: openai.OpenAI) -> None:
    """All but the one that ends the output."""
    bias: Any = {"logit_bias": {_IM_START: 100}, "max_tokens": 2}

    assert _completion(client, **bias).choices[0].text == ""
    shown = _completion(client, **bias, extra_body={"skip_special_tokens": False})
    ended = _completion(client, logit_bias={_EOS: 100}, extra_body={"skip_special_tokens": False})

    assert shown.choices[0].text == "<|im_start|><|im_start|>"
    assert ended.choices[0].text == ""


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"min_tokens": 13}, "min_tokens=13 is more than max_tokens=12"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "response_format": {"type": "json_object"}}, "keeps a grammar"),
        ({"best_of": 3}, "best_of=3 is not supported"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"min_p": 2}, "min_p=2"),
        ({"top_k": -3}, "top_k=-3"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(
    client: openai.OpenAI, extra: dict[str, Any], word: str
) -> None:
    """400, before anything is computed."""
    with pytest.raises(openai.BadRequestError, match=word):
        ask(client, extra_body=extra)


def test_a_suffix_is_refused(client: openai.OpenAI) -> None:
    """The models that are served complete at the end only."""
    with pytest.raises(openai.BadRequestError, match="suffix='end' is not supported"):
        _completion(client, suffix="end")


def test_likely_tokens_alone_are_the_greedy_ones(client: openai.OpenAI) -> None:
    """top_k=1 and min_p=1 leave the most likely token at any temperature."""
    greedy = text_of(ask(client))
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert text_of(ask(client, temperature=1.5, seed=7, extra_body=extra)) == greedy
