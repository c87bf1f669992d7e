"""What the engine tells of misses: from what was sent, and what was given up for which reason."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvkeep import LLM, CacheOptions, SamplingParams, Selector
from kvkeep.cache import Receipt
from kvkeep.cache.explain import Miss, MissType, Outline
from kvkeep.testing.faulty_tier import Fault
from kvkeep.testing.tiny_models import build_tiny
from tests.faulty_settings import FaultyHost
from tests.lifetime_books import Clock

GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
SIZE = 8
PROMPT = list(range(10, 50))
# The same text behind another beginning.
CHANGED = [99, *PROMPT[1:]]


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An engine without tiers, with a clock set by hand."""
    model = build_tiny("llama")
    with LLM(model, block_size=8, capacity="4MB", calibration_folder=None) as llm:
        llm.engine.cache.lifetimes.clock = Clock()
        yield llm


def receipt_of(llm: LLM, prompt: list[int], outline: Outline | None, **options: str) -> Receipt:
    """What a request cost, asked of the engine itself."""
    llm.engine.add(
        prompt,
        GREEDY,
        CacheOptions(**options),  # type: ignore[arg-type]
        outline=outline,
        explains=outline is not None,
    )
    receipts: list[Receipt] = []
    while llm.engine.has_work:
        receipts += [piece.receipt for piece in llm.engine.step() if piece.receipt is not None]
    (receipt,) = receipts
    return receipt


def reason(llm: LLM, prompt: list[int], **options: str) -> MissType | None:
    """Why a request that asks missed, if it did."""
    miss = receipt_of(llm, prompt, Outline(), **options).miss
    return None if miss is None else miss.type


def test_a_receipt_says_why_a_request_missed(llm: LLM) -> None:
    """Nothing before, a hit, a changed beginning, expired, purged."""
    clock = llm.engine.cache.lifetimes.clock
    assert isinstance(clock, Clock)
    assert reason(llm, PROMPT, ttl="1m") is MissType.FIRST_REQUEST
    assert reason(llm, PROMPT, ttl="1m") is None
    miss = receipt_of(llm, [99, *PROMPT[1:]], Outline(message_starts=(0,))).miss
    assert miss is not None
    assert (miss.type, miss.first_divergent_token) == (MissType.MESSAGES_CHANGED, 0)
    clock.now_s += 60
    assert reason(llm, PROMPT) is MissType.EXPIRED
    assert reason(llm, PROMPT) is None
    llm.cache.purge(Selector(everything=True))
    assert reason(llm, PROMPT) is MissType.INVALIDATED


def missed_over(llm: LLM, prompt: list[int]) -> Miss:
    """What a prompt misses of which all lies in the tier."""
    receipt_of(llm, prompt, None)
    llm.cache.offload()
    miss = receipt_of(llm, prompt, Outline()).miss
    assert miss is not None
    return miss


def over(*faults: Fault) -> LLM:
    """An engine over memory with faults, of which everything is loaded."""
    tiers = [FaultyHost(faults=faults)]
    options: dict[str, Any] = {"loading": "always", "idle_s": None, "calibration_folder": None}
    return LLM(build_tiny("llama"), block_size=SIZE, capacity="4MB", tiers=tiers, **options)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flip", MissType.CORRUPT_REJECTED),
        ("truncate", MissType.CORRUPT_REJECTED),
        ("swap", MissType.CORRUPT_REJECTED),
        ("fail", MissType.UNKNOWN),
    ],
)
def test_blocks_that_fail_their_checks_are_the_reason(kind: str, expected: MissType) -> None:
    """Wrong bits, missing ends and other blocks; of what a tier does not give, nothing is known."""
    with over(Fault(kind, "get", calls=[1, 2])) as llm:
        miss = missed_over(llm, PROMPT)

        assert miss.type is expected
        assert miss.missed_tokens == 2 * SIZE
        is_counted = expected is MissType.CORRUPT_REJECTED
        assert llm.engine.history.num_gone(MissType.CORRUPT_REJECTED) == 2 * is_counted


def test_what_fails_when_the_answer_is_under_way_is_told_too() -> None:
    """The first block is computed while others load; one of these turns out to be wrong."""
    with over(Fault("flip", "get", calls=[1])) as llm:
        receipt_of(llm, PROMPT, None)
        llm.cache.offload()
        llm.cache.drop(PROMPT, [0])
        miss = receipt_of(llm, PROMPT, Outline()).miss

    assert miss is not None
    assert miss.type is MissType.INVALIDATED
    assert miss.missed_tokens == 2 * SIZE


def test_the_last_token_of_an_answer_was_not_computed(llm: LLM) -> None:
    """A block that it would have filled is not missed by who goes on from there."""
    prompt = PROMPT[: -GREEDY.max_tokens]
    output = llm.generate([prompt], GREEDY)[0]
    longer = [*prompt, *output.token_ids, *range(60, 70)]
    assert len(prompt) + len(output.token_ids) == 5 * SIZE

    receipt = receipt_of(llm, longer, Outline())

    assert receipt.reused_tokens == 4 * SIZE
    assert receipt.miss is None


def test_a_session_that_is_closed_is_forgotten(llm: LLM) -> None:
    """Nobody is shown what only it has sent; what others have sent as well stays."""
    receipt_of(llm, PROMPT, None, session="a")
    receipt_of(llm, PROMPT[::-1], None, session="a")
    receipt_of(llm, PROMPT[::-1], None, session="b")
    llm.cache.close_session("a")

    assert reason(llm, [98, *PROMPT[::-1][1:]]) is MissType.MESSAGES_CHANGED
    assert reason(llm, CHANGED) is MissType.FIRST_REQUEST


def test_a_session_that_nobody_uses_is_forgotten(llm: LLM) -> None:
    """Its end by itself is an end as well."""
    clock = llm.engine.cache.lifetimes.clock
    assert isinstance(clock, Clock)
    receipt_of(llm, PROMPT, None, session="a")
    clock.now_s += llm.engine.cache.lifetimes.settings.session_ttl_s + 1

    assert reason(llm, CHANGED) is MissType.FIRST_REQUEST


@pytest.mark.parametrize("how", ["erase", "purge"])
def test_a_tenant_that_is_erased_is_forgotten(llm: LLM, how: str) -> None:
    """Its prompts are compared with no more, and those of others still are."""
    for salt in ("ada", "bob"):
        receipt_of(llm, PROMPT, None, salt=salt)
    if how == "erase":
        llm.cache.erase("ada")
    else:
        llm.cache.purge(Selector(salts=("ada",)))

    assert reason(llm, CHANGED, salt="ada") is MissType.FIRST_REQUEST
    assert reason(llm, CHANGED, salt="bob") is MissType.MESSAGES_CHANGED
    assert reason(llm, PROMPT, salt="ada") is MissType.INVALIDATED


def test_a_purge_of_everything_forgets_all_prompts(llm: LLM) -> None:
    """One of a tag alone leaves what was sent to compare with."""
    for salt in ("ada", "bob"):
        receipt_of(llm, PROMPT, None, salt=salt)
    llm.cache.purge(Selector(tags=("none",)))
    assert reason(llm, CHANGED, salt="bob") is MissType.MESSAGES_CHANGED

    llm.cache.purge(Selector(everything=True))

    assert reason(llm, CHANGED[::-1], salt="bob") is MissType.FIRST_REQUEST
    assert reason(llm, [97, *PROMPT[1:]], salt="ada") is MissType.FIRST_REQUEST


def test_a_request_that_does_not_ask_is_told_nothing(llm: LLM) -> None:
    """It is remembered all the same, so that the next one can be told."""
    assert receipt_of(llm, PROMPT, None).miss is None
    assert reason(llm, [99, *PROMPT[1:]]) is not MissType.FIRST_REQUEST
