"""What requests say of the cache, under any of its names, becomes CacheOptions, or a warning."""

from dataclasses import replace
from typing import Any, cast

import pytest

from kvkeep.cache import Receipt
from kvkeep.cache.explain.miss import Miss, MissType
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.errors import ConfigError, RequestError
from kvkeep.hf.load import load_model
from kvkeep.server.cache_fields import (
    CachedRequest,
    CacheFields,
    read_cache_fields,
    without_cache_fields,
)
from kvkeep.server.cache_report import cache_headers, cache_report, usage_fields, written_tokens
from kvkeep.server.token_texts import TokenTexts, Vocabulary


def _read(body: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> CacheFields:
    return read_cache_fields(CachedRequest.model_validate(body), headers or {}, **more)


def test_the_object_gives_every_field_of_the_options() -> None:
    """Each field of `kv_cache` arrives under its own name, and explain beside them."""
    fields = _read(
        {
            "kv_cache": {
                "session": "user-42",
                "context": "legal-v3",
                "tags": ["tenant:acme", "doc:77"],
                "salt": "pepper",
                "ttl": "1h",
                "ttl_counts_from": "first",
                "pin": True,
                "priority": 80,
                "read": False,
                "write": False,
                "explain": True,
            }
        }
    )

    assert fields.options == CacheOptions(
        session="user-42",
        context="legal-v3",
        tags=["tenant:acme", "doc:77"],
        salt="pepper",
        ttl="1h",
        ttl_counts_from="first",
        pin=True,
        priority=80,
        read=False,
        write=False,
    )
    assert fields.explain
    assert fields.warnings.texts == ()


def test_a_request_without_a_word_asks_for_nothing() -> None:
    """No field set: the options are the defaults, and there is no header."""
    fields = _read({})

    assert fields.options == CacheOptions()
    assert not fields.explain
    assert fields.warnings.headers() == {}


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({"session_id": "s"}, {}, CacheOptions(session="s")),
        ({}, {"x-session-id": "s"}, CacheOptions(session="s")),
        ({"cache_salt": "x"}, {}, CacheOptions(salt="x")),
        ({"cache_prompt": False}, {}, CacheOptions(read=False, write=False)),
        ({"cache_prompt": True}, {}, CacheOptions()),
        ({"prompt_cache_key": "k"}, {}, CacheOptions()),
        ({"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}, {}, CacheOptions(ttl="30m")),
        ({"prompt_cache_retention": "24h"}, {}, CacheOptions(ttl="24h")),
        ({"cache_control": {"type": "ephemeral"}}, {}, CacheOptions(ttl="5m")),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, {}, CacheOptions(ttl="1h")),
        ({"kv_cache": {"ttl": -1}}, {}, CacheOptions(ttl="never")),
        ({"kv_cache": {"ttl": 0}}, {}, CacheOptions(ttl=0)),
        (
            {"session_id": "s", "cached_content": "cachedContents/law"},
            {},
            CacheOptions(session="s", context="law"),
        ),
    ],
)
def test_every_alias_is_heard(
    body: dict[str, Any], headers: dict[str, str], expected: CacheOptions
) -> None:
    """What other servers call it means the same here, without a warning."""
    fields = _read(body, headers)

    assert fields.options == expected
    assert fields.warnings.texts == ()


def test_the_object_comes_before_its_aliases() -> None:
    """A contradiction is settled for `kv_cache`, and said."""
    fields = _read({"kv_cache": {"session": "a"}, "session_id": "b"}, {"x-session-id": "a"})

    assert fields.options.session == "a"
    assert fields.warnings.texts == ("session_id is ignored: kv_cache.session says otherwise",)


def test_the_longest_mark_of_all_parts_holds() -> None:
    """`cache_control` on a tool, a message's part, or the request: the longest lifetime is taken."""
    messages = [
        {"role": "system", "content": [{"type": "text", "cache_control": {"ttl": "1h"}}]},
        {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
    ]

    fields = _read({}, messages=messages, marked=[{"cache_control": {"ttl": "30m"}}])

    assert fields.options.ttl == "1h"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"kv_cache": {"sesion": "x"}}, "did you mean session?"),
        ({"frobnicate": 1}, "'frobnicate' is unknown and ignored"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options.mode is ignored"),
        ({"prompt_cache_retention": "in_memory"}, "prompt_cache_retention is ignored"),
        ({"cached_content": "law"}, "a context needs a session"),
    ],
)
def test_what_is_not_followed_is_said(body: dict[str, Any], word: str) -> None:
    """Unknown and unfollowed fields are no errors; the header names them."""
    header = _read(body).warnings.headers()["X-KV-Warnings"]

    assert word in header


def test_the_warnings_of_a_hostile_client_fit_into_one_header() -> None:
    """Names with line breaks or without end neither break out of the header nor fill it."""
    names = ["a\r\nSet-Cookie: b", "ü", *(f"field{n:04}" * 20 for n in range(100))]

    header = _read(dict.fromkeys(names, 1)).warnings.headers()["X-KV-Warnings"]

    assert header.isascii()
    assert header.isprintable()
    assert len(header) <= 1024


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kv_cache": {"ttl": "soon"}}, "kv_cache.ttl="),
        ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl="),
        ({"cache_control": {"ttl": "soon"}}, "cache_control.ttl="),
        ({"kv_cache": {"priority": 101}}, "kv_cache.priority="),
        ({"session_id": ""}, "session_id="),
        ({"kv_cache": {"context": "law"}}, "kv_cache.context="),
    ],
)
def test_an_impossible_value_is_refused_under_the_name_it_came_by(
    body: dict[str, Any], field: str
) -> None:
    """The error begins with the field as the client wrote it."""
    with pytest.raises((RequestError, ConfigError)) as caught:
        _read(body)

    assert str(caught.value).startswith(field)


def test_tags_of_parts_begin_where_their_part_begins() -> None:
    """A tag of message 1 and one of its second part are placed at the tokens given for these."""
    messages = [
        {"role": "system", "content": "rules"},
        {
            "role": "user",
            "kv_cache": {"tags": ["chat"]},
            "content": [
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b", "kv_cache": {"tags": ["doc:77"]}},
            ],
        },
    ]
    fields = _read({"kv_cache": {"tags": ["all"]}}, messages=messages)

    options = fields.options_for(salt="mixed", message_starts=(0, 10), part_starts=((0,), (12, 20)))

    assert options.salt == "mixed"
    assert options.tag_spans == (
        TagSpan(tag="all", start=0),
        TagSpan(tag="chat", start=10),
        TagSpan(tag="doc:77", start=20),
    )


def test_a_part_whose_place_is_unknown_is_covered_from_its_message_on() -> None:
    """A tag never covers less than what it was given for."""
    part = {"type": "text", "text": "b", "kv_cache": {"tags": ["doc"]}}
    fields = _read({}, messages=[{"role": "user", "content": [part]}])

    assert fields.options_for(salt=None, message_starts=(7,)).tag_spans[0].start == 7
    assert fields.options_for(salt=None).tag_spans[0].start == 0


def test_a_part_can_only_be_tagged() -> None:
    """Anything else said of a part is warned about; what is no list of tags is refused."""
    messages = [{"role": "user", "content": "x", "kv_cache": {"tags": ["t"], "ttl": 5}}]

    fields = _read({}, messages=messages)

    assert "messages[0].kv_cache.ttl is ignored" in fields.warnings.texts[0]
    with pytest.raises(RequestError, match="is no list of texts"):
        _read({}, messages=[{"role": "user", "kv_cache": {"tags": "t"}}])


def test_templates_see_nothing_of_it() -> None:
    """Fields of the cache are taken out of messages and parts; the rest stays, and so do the originals."""
    part = {"type": "text", "text": "a", "cache_control": {}, "prompt_cache_breakpoint": {}}
    message = {"role": "user", "content": [part], "kv_cache": {"tags": ["t"]}}

    (bare,) = without_cache_fields([message])

    assert bare == {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert "kv_cache" in message


def _receipt(
    prompt: int,
    reused: int,
    output: int = 3,
    miss: Miss | None = None,
    expires_at: float | None = None,
) -> Receipt:
    return Receipt(
        miss=miss,
        expires_at=expires_at,
        prompt_tokens=prompt,
        reused_tokens=reused,
        computed_tokens=prompt - reused,
        output_tokens=output,
        tokens_by_source={"device": reused, "computed": prompt - reused},
        queue_s=0.05,
        restore_s=0.02 if reused else 0.0,
        saved_s=1.25 if reused else None,
        first_token_s=0.25,
        total_s=0.5,
    )


@pytest.mark.parametrize(
    ("prompt", "reused", "written"),
    [
        (100, 0, 96),
        (100, 64, 32),
        (100, 96, 0),
        (96, 95, 0),
        (31, 0, 0),
        (96, 70, 26),
        (96, 64, 32),
    ],
)
def test_written_tokens_are_those_of_new_full_blocks(
    prompt: int, reused: int, written: int
) -> None:
    """Blocks of 32: the tail is not kept, and what was there, even in part, is not written again."""
    receipt = _receipt(prompt, reused)

    assert written_tokens(receipt, CacheOptions(), 32) == written
    assert written_tokens(receipt, CacheOptions(write=False), 32) == 0


def test_usage_says_nought_as_nought() -> None:
    """Both cache counts are always there."""
    assert usage_fields([_receipt(10, 0)], 0) == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "reused", "status"),
    [
        *[(100, 0, "MISS"), (1211, 1, "MISS"), (12, 3, "MISS"), (31, 30, "MISS")],
        *[(100, 64, "PARTIAL"), (100, 96, "HIT"), (96, 95, "HIT")],
    ],
)
def test_the_header_says_how_much_was_there(prompt: int, reused: int, status: str) -> None:
    """HIT is all that could be there: the tail of a block, or the last token, is always computed."""
    headers = cache_headers([_receipt(prompt, reused)], 32)

    assert headers["x-kv-cache"] == f"{status}; tokens={reused}/{prompt}"
    restore = "restore;dur=20.0, " if reused else ""
    times = f"queue;dur=50.0, {restore}prefill;dur=200.0, first_token;dur=250.0, total;dur=500.0"
    assert headers["Server-Timing"] == times


def test_times_of_several_prompts_are_those_of_the_slowest() -> None:
    """A request of which nobody computed anything has its end only."""
    aborted = replace(_receipt(5, 0), queue_s=None, first_token_s=None, total_s=0.75)
    slow = replace(_receipt(5, 0), queue_s=0.2)

    headers = cache_headers([aborted, _receipt(100, 64), slow], 32)

    expected = "queue;dur=200.0, restore;dur=20.0, prefill;dur=200.0, first_token;dur=250.0, "
    assert headers["Server-Timing"] == expected + "total;dur=750.0"


def test_the_report_tells_what_the_receipt_knows() -> None:
    """Tiers, times, and when the blocks expire."""
    receipt = _receipt(100, 64, expires_at=1_800_000_060.0)
    report = cache_report(receipt, CacheOptions(session="s"), 32)

    assert report["session"] == "s"
    assert report["status"] == "partial"
    assert report["tiers"] == {"device": 64}
    assert report["computed_tokens"] == 36
    assert report["ttft_ms"] == 250.0
    assert report["queue_ms"] == 50.0
    assert report["restore_ms"] == 20.0
    assert report["saved_ms_est"] == 1250.0
    assert report["expires_at"] == "2027-01-15T08:01:00+00:00"
    beyond_calendars = _receipt(1, 0, expires_at=1e300)
    assert cache_report(beyond_calendars, CacheOptions(), 32)["expires_at"] is None


def test_a_miss_is_told_with_both_texts_where_texts_may_be_told() -> None:
    """Tokens of the prompt that was cached and of the one that was sent, as text."""
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    miss = Miss(
        type=MissType.SYSTEM_CHANGED,
        missed_tokens=64,
        first_divergent_token=5,
        message_index=0,
        cached_ids=tuple(tokenizer.encode("on Monday")),
        sent_ids=tuple(tokenizer.encode("on Tuesday")),
    )
    receipt = _receipt(100, 0, miss=miss)
    texts = TokenTexts(cast("Vocabulary", tokenizer))

    told = cache_report(receipt, CacheOptions(), 32, texts=texts)["miss"]
    bare = cache_report(receipt, CacheOptions(), 32)["miss"]

    expected = {
        "type": "system_changed",
        "first_divergent_token": 5,
        "message_index": 0,
        "missed_tokens": 64,
    }
    assert bare == expected
    assert told == expected | {"cached_text": "on Monday", "sent_text": "on Tuesday"}
