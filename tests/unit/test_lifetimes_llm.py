"""Lifetimes as the user of an LLM has them: options of requests, and the methods of `llm.cache`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep import LLM, CacheOptions, CapacityError, RequestError, SamplingParams
from kvkeep.cache import Selector
from kvkeep.config import TagSpan
from kvkeep.testing.tiny_models import build_tiny
from kvkeep.tiers import Disk
from tests.lifetime_books import Clock

SIZE = 8
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPT = list(range(10, 50))  # five full blocks


def small(**options: Any) -> LLM:
    """An engine over a tiny model."""
    settings: dict[str, Any] = {
        "block_size": SIZE,
        "capacity": "4MB",
        "poison": True,
        "idle_s": None,
    }
    settings |= {"loading": "always", "calibration_folder": None}
    return LLM(build_tiny("llama"), **(settings | options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An engine without tiers, with a clock set by hand."""
    with small() as llm:
        llm.engine.cache.lifetimes.clock = Clock()
        yield llm


def reused(llm: LLM, prompt: list[int], **options: Any) -> int:
    """Prompt tokens that a request of these options does not compute."""
    output = llm.generate([prompt], GREEDY, cache=CacheOptions(**options))[0]
    return output.receipt.reused_tokens


def known(llm: LLM, prompt: list[int], salt: str | None = None) -> int:
    """Tokens of a prompt that are cached."""
    return llm.cache.coverage(prompt, salt=salt).known_tokens


def test_a_session_is_closed_and_its_answer_goes_with_it(llm: LLM) -> None:
    """Prompt and output blocks of the session alone are forgotten, and the receipt counts them."""
    reused(llm, PROMPT, session="a")
    report = llm.cache.session("a")
    assert report.num_tokens == len(PROMPT) + 4
    assert (report.num_blocks, report.num_own_blocks, report.num_running) == (5, 5, 0)
    reused(llm, PROMPT[:17])

    receipt = llm.cache.close_session("a")

    assert receipt.deleted == 3
    assert known(llm, PROMPT) == 16
    assert llm.cache.sessions() == []
    assert llm.cache.verify().ok


def test_a_fork_keeps_the_conversation(llm: LLM) -> None:
    """Closing the parent leaves all to the child."""
    reused(llm, PROMPT, session="a")
    child = llm.cache.fork_session("a", "b")
    assert child.num_blocks == 5

    assert llm.cache.close_session("a").deleted == 0
    assert known(llm, PROMPT) == 40
    assert llm.cache.close_session("b").deleted == 5
    with pytest.raises(RequestError, match="session='a'"):
        llm.cache.fork_session("a", "c")


def test_a_session_is_exported_and_imported(llm: LLM, tmp_path: Path) -> None:
    """The last conversation of a session goes to a file and comes back as blocks of everybody."""
    reused(llm, PROMPT, session="a")
    file = tmp_path / "a.kvkeep"
    llm.cache.export_session(file, "a")
    llm.cache.purge(Selector(everything=True))
    assert known(llm, PROMPT) == 0

    llm.cache.import_(file)

    assert known(llm, PROMPT) >= 40
    assert llm.cache.verify().ok
    llm.cache.close_session("a")
    with pytest.raises(RequestError, match="session='a'"):
        llm.cache.export_session(file, "a")


def test_time_passes(llm: LLM) -> None:
    """A request's blocks end when it said, and not before."""
    clock = llm.engine.cache.lifetimes.clock
    assert isinstance(clock, Clock)
    reused(llm, PROMPT, ttl="1m")
    clock.now_s += 59
    assert reused(llm, [*PROMPT, 1], ttl="1m") == 40
    clock.now_s += 60
    assert known(llm, PROMPT) == 0
    assert llm.cache.expire().deleted == 5
    assert reused(llm, PROMPT) == 0


def test_a_default_life_comes_from_the_settings() -> None:
    """And a request that says "never" is not bound by it."""
    with small(default_ttl="10s") as llm:
        clock = llm.engine.cache.lifetimes.clock = Clock()
        reused(llm, PROMPT)
        reused(llm, PROMPT[::-1], ttl="never")
        clock.now_s += 10
        assert known(llm, PROMPT) == 0
        assert known(llm, PROMPT[::-1]) == 40


def test_a_purge_by_tag_reaches_a_request_that_runs(llm: LLM) -> None:
    """Its blocks go at once, it ends in good order, and leaves nothing behind."""
    options = CacheOptions(tags=[TagSpan(tag="doc:77", start=20)])
    with llm.stream(PROMPT, GREEDY, cache=options) as stream:
        next(stream)
        receipt = llm.cache.purge(Selector(tags=("doc:77",)))
        assert (receipt.deleted, receipt.in_use) == (3, 3)
        pieces = list(stream)
    assert pieces[-1].receipt is not None
    assert sum(len(piece.token_ids) for piece in pieces) == 3
    assert known(llm, PROMPT) == 16
    assert llm.cache.verify().ok


def test_a_purge_names_the_blocks_of_a_prompt(llm: LLM) -> None:
    """By the keys of its tokens; a dry run does nothing."""
    reused(llm, PROMPT)
    selector = Selector(keys=llm.cache.keys(PROMPT[:16]))
    assert llm.cache.purge(selector, dry_run=True).matched == 2
    assert known(llm, PROMPT) == 40
    assert llm.cache.purge(selector).deleted == 2
    assert reused(llm, PROMPT) == 40 - 16 - 1


def test_pins_of_an_llm(llm: LLM) -> None:
    """Pinned by name, listed, kept out of a purge, released; unknown prompts cannot be pinned."""
    with pytest.raises(RequestError, match="warm first"):
        llm.cache.pin(PROMPT, name="system")
    receipt = llm.cache.warm(PROMPT, CacheOptions(ttl="1m"))
    assert (receipt.computed_tokens, receipt.output_tokens) == (40, 0)
    assert llm.cache.pin(PROMPT, name="system").num_on_device == 5

    assert llm.cache.purge(Selector(everything=True)).skipped_pinned == 5
    assert [(pin.name, pin.num_blocks) for pin in llm.cache.pins()] == [("system", 5)]
    llm.cache.unpin("system")
    assert llm.cache.purge(Selector(everything=True)).deleted == 5
    assert llm.cache.stats().in_use_bytes == 0


def test_a_request_that_pins_too_much_is_refused_with_both_numbers() -> None:
    """Before it is queued; nothing of it stays."""
    with small(pin_share=0.0) as llm:
        with pytest.raises(CapacityError, match=r"keep 5 blocks, and may keep 0"):
            reused(llm, PROMPT, pin=True)
        assert llm.cache.pins() == []
        assert not llm.engine.has_work


def test_a_tenant_is_erased(llm: LLM) -> None:
    """With its sessions and pins; the others keep theirs."""
    reused(llm, PROMPT, salt="x", session="a", pin=True)
    reused(llm, PROMPT, session="a")

    receipt = llm.cache.erase("x")

    assert receipt.deleted == 5
    assert known(llm, PROMPT, "x") == 0
    assert known(llm, PROMPT) == 40
    assert llm.cache.pins() == []
    assert len(llm.cache.sessions()) == 1
    assert llm.cache.verify().ok


def test_a_quota_bounds_a_tenant(llm: LLM) -> None:
    """What is unused for longest goes when a request has ended."""
    block_bytes = sum(g.block_bytes(SIZE) for g in llm.engine.cache.spec.groups)
    report = llm.cache.set_quota("x", 6 * block_bytes)
    assert report is not None
    assert report.used_bytes == 0
    reused(llm, PROMPT, salt="x")
    clock = llm.engine.cache.lifetimes.clock
    assert isinstance(clock, Clock)
    clock.now_s += 1
    reused(llm, PROMPT[::-1], salt="x")

    (report,) = llm.cache.quotas()
    assert 0 < report.used_bytes <= report.limit_bytes
    assert known(llm, PROMPT[::-1], "x") == 40
    assert llm.cache.set_quota("x", None) is None
    assert llm.cache.quotas() == []


def test_entries_say_what_a_block_bears_and_where_it_lies(tmp_path: Path) -> None:
    """On the device and in tiers, page by page."""
    with small(tiers=[Disk(tmp_path, "64MB")]) as llm:
        reused(llm, PROMPT, session="a", tags=["t"], ttl="1h", priority=70)
        llm.cache.offload()
        reused(llm, PROMPT[:16], session="b")
        everything = Selector(everything=True)

        entries = llm.cache.entries(everything)

        assert len(entries) == 5
        by_key = {one.key: one for one in entries}
        first, *_, last = (by_key[key] for key in llm.cache.keys(PROMPT))
        assert first.places == ("device", "disk")
        assert last.places == ("disk",)
        assert (first.sessions, last.sessions) == (("a", "b"), ("a",))
        assert (last.tags, last.priority, last.is_shared) == (("t",), 70, False)
        assert last.expires_at is not None
        assert last.expires_at - last.created_at >= 3600
        assert first.expires_at is None
        rest = llm.cache.entries(everything, limit=3, after=entries[1].key)
        assert [one.key for one in rest] == [one.key for one in entries[2:]]


def test_lives_and_sessions_survive_the_process(tmp_path: Path) -> None:
    """What an LLM stored an earlier one can end."""
    with small(tiers=[Disk(tmp_path, "64MB")]) as llm:
        reused(llm, PROMPT, session="a", tags=["t"])
        reused(llm, PROMPT[::-1], ttl=0.01)
    with small(tiers=[Disk(tmp_path, "64MB")]) as llm:
        assert [report.name for report in llm.cache.sessions()] == ["a"]
        assert reused(llm, PROMPT[::-1]) == 0
        assert reused(llm, PROMPT) == 39
        receipt = llm.cache.purge(Selector(tags=("t",)))
        assert receipt.deleted == 5
        assert receipt.stored == {"disk": 5}
        assert known(llm, PROMPT) == 0
