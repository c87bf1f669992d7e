"""Arguments of the Python API that are none: an error of kvkeep's, with field, value and remedy."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from kvkeep import LLM, CacheOptions, KeepCache, SamplingParams
from kvkeep.errors import ConfigError, RequestError
from kvkeep.tiers import Host

ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model."""
    with LLM("tiny", capacity="16MB") as found:
        yield found


def make_any(make: Callable[..., object], *values: object, **options: object) -> object:
    """Called as nothing checks types."""
    return make(*values, **options)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages='Hi' is no list of messages; give"),
        ({"role": "user", "content": "x"}, "is no list of messages; give"),
        (5, "messages=5 is no list of messages; give"),
        ([], "messages is empty; give"),
        (["a"], r"messages\[0\]='a' is no message; give"),
        ([{"content": "x"}], r"messages\[0\]\.role=None is no role; give"),
        ([{"role": "user"}], r"messages\[0\]\.content=None is no text; give"),
        ([{"role": "assistant"}], "cannot be written in the model's chat template .*; change"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: object, message: str) -> None:
    """By place and field; never an error of the template's own."""
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, ONE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", 5], r"prompts\[1\]=5 is neither text nor token ids; give"),
        (["a", None], r"prompts\[1\]=None is neither"),
        ([[1], {"role": "user"}], r"prompts\[1\]=.* and messages to chat"),
        (5, "prompts=5 is neither text nor token ids"),
        ([1, "a"], "token_ids=.* are not token ids"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: object, message: str) -> None:
    """Before any of them is run."""
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, ONE)  # type: ignore[arg-type]
    assert not llm.engine.has_work


def test_other_ways_in_refuse_it_too(llm: LLM) -> None:
    """Streams, parameters, and text where token ids are asked for."""
    with pytest.raises(RequestError, match="prompt=5 is neither"):
        llm.stream(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="params=5 is no SamplingParams"):
        llm.generate("x", 5)  # type: ignore[arg-type]
    for ask in (llm.cache.coverage, llm.cache.keys):
        with pytest.raises(RequestError, match=r"token_ids='text' is text; give .*LLM\.encode"):
            ask("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("tiers", [Host("1MB"), "host:1MB", [Host("1MB")], ("host:1MB",)])
def test_one_tier_needs_no_list(tiers: object) -> None:
    """Alone or in a list, as settings or as text."""
    with LLM("tiny", capacity="16MB", tiers=tiers) as llm:  # type: ignore[arg-type]
        assert [report.tier.name for report in llm.cache.stats().tiers] == ["host"]


@pytest.mark.parametrize("tiers", [5, [5], Host, None])
def test_what_is_no_tier_is_refused(tiers: object) -> None:
    """With what is one."""
    with pytest.raises(ConfigError, match=r"tiers=.* is no tier; give Host, Disk or Remote"):
        LLM("tiny", capacity="16MB", tiers=tiers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: make_any(SamplingParams, max_token=1), "max_token=1 .* did you mean max_tokens"),
        (lambda _: make_any(replace, ONE, max_token=1), "max_token=1 .* did you mean max_tokens"),
        (lambda _: make_any(CacheOptions, tag=["a"]), r"tag=\['a'\] .* did you mean tags"),
        (
            lambda llm: make_any(KeepCache, llm.model, capcity=1),
            "capcity=1 .* did you mean capacity",
        ),
    ],
)
def test_a_name_that_there_is_not_has_its_nearest(
    llm: LLM, make: Callable[[LLM], object], message: str
) -> None:
    """As the settings of LLM have it."""
    with pytest.raises(ConfigError, match=message):
        make(llm)
