"""What the engine tells of misses: from what was sent, and what was given up for which reason."""

from collections.abc import Iterator

import pytest

from kvkeep import LLM, CacheOptions, SamplingParams, Selector
from kvkeep.cache import Receipt
from kvkeep.cache.explain import MissType, Outline
from kvkeep.testing.tiny_models import build_tiny
from tests.lifetime_books import Clock

GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
PROMPT = list(range(10, 50))


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


def test_a_request_that_does_not_ask_is_told_nothing(llm: LLM) -> None:
    """It is remembered all the same, so that the next one can be told."""
    assert receipt_of(llm, PROMPT, None).miss is None
    assert reason(llm, [99, *PROMPT[1:]]) is not MissType.FIRST_REQUEST
