"""The times of a receipt: in the queue, waiting for tiers, and saved; and what its first piece tells."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvkeep.cache import Chooser, Receipt
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import Engine, Piece
from kvkeep.engine.step_costs import StepCosts
from kvkeep.llm import LLM
from kvkeep.planning import ComputeCost
from kvkeep.planning.calibration import Calibration
from kvkeep.scheduling import Request
from kvkeep.spec import RequestId, Span
from kvkeep.testing.faulty_tier import Fault
from kvkeep.testing.tiny_models import build_tiny
from tests.content_store import cache_of, full
from tests.faulty_settings import FaultyHost

SIZE = 8
PROMPT = list(range(10, 74))  # eight full blocks
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
COST = ComputeCost(fixed_s=0.01, linear_s=0.001, quadratic_s=1e-6)
DELAY_S = 0.1


def small(*tiers: Any, **options: Any) -> LLM:
    """An engine over a tiny model."""
    settings: dict[str, Any] = {"block_size": SIZE, "capacity": "4MB", "idle_s": None}
    settings |= {"loading": "always", "calibration_folder": None}
    return LLM(build_tiny("llama"), tiers=tiers, **(settings | options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    """One without tiers that serves one request at a time."""
    with small(max_requests=1) as llm:
        yield llm


def pieces_of(engine: Engine, *request_ids: RequestId) -> list[list[Piece]]:
    """The pieces of some requests, when all is done."""
    pieces: list[Piece] = []
    while engine.has_work:
        pieces += engine.step()
    return [[one for one in pieces if one.request_id == own] for own in request_ids]


def receipt_of(llm: LLM, prompt: Sequence[int] = PROMPT) -> Receipt:
    """What a prompt cost, alone."""
    return llm.generate([list(prompt)], GREEDY)[0].receipt


# --- in the queue --------------------------------------------------------------------------------


def test_a_request_without_a_seat_is_in_the_queue(llm: LLM) -> None:
    """It waits for as long as the one before it runs, and longer; one that was never begun says nothing."""
    ids = [llm.engine.add(PROMPT, GREEDY, CacheOptions()) for _ in range(3)]
    (aborted,) = llm.engine.abort(ids[2])
    first, second = (own[-1].receipt for own in pieces_of(llm.engine, *ids[:2]))

    assert first is not None
    assert second is not None
    assert aborted.receipt is not None
    assert first.queue_s is not None
    assert second.queue_s is not None
    assert second.queue_s > first.total_s - first.queue_s
    for receipt in (first, second):
        assert receipt.queue_s is not None
        assert receipt.first_token_s is not None
        assert receipt.queue_s < receipt.first_token_s
    assert aborted.receipt.queue_s is None


def test_the_engine_says_who_waits_and_who_runs(llm: LLM) -> None:
    """As many as there are seats run."""
    for _ in range(3):
        llm.engine.add(PROMPT, GREEDY, CacheOptions())
    assert (llm.engine.num_waiting, llm.engine.num_running) == (3, 0)

    llm.engine.step()

    assert (llm.engine.num_waiting, llm.engine.num_running) == (2, 1)


# --- from tiers ----------------------------------------------------------------------------------


def test_waiting_for_a_slow_tier_is_told() -> None:
    """Each load takes a while, and nothing can be computed before the first has come."""
    with small(FaultyHost(faults=(Fault("delay", "get", probability=1, delay_s=DELAY_S),))) as llm:
        cold = receipt_of(llm)
        llm.cache.offload()
        restored = receipt_of(llm)
        warm = receipt_of(llm)

    assert restored.tokens_by_source["host"] == len(PROMPT) - 1
    assert restored.queue_s is not None
    # Two at a time.
    assert restored.restore_s >= len(PROMPT) // SIZE // 2 * DELAY_S
    assert restored.queue_s >= restored.restore_s
    assert restored.total_s > restored.restore_s
    assert (cold.restore_s, warm.restore_s) == (0, 0)


def test_loads_that_fail_are_waited_for_too() -> None:
    """A tier that answers late with nothing costs its time, and the time of the loads after it."""
    faults = (
        Fault("delay", "get", calls=range(6, 100), delay_s=DELAY_S),
        Fault("fail", "get", calls=[5]),
    )
    with small(FaultyHost(faults=faults)) as llm:
        receipt_of(llm)
        llm.cache.offload()
        restored = receipt_of(llm)

    assert restored.load_failures == {"unavailable": 1}
    assert restored.restore_s >= DELAY_S


# --- saved ---------------------------------------------------------------------------------------


def request_with(gaps: Sequence[Span], num_prompt: int) -> Request:
    """A request that found all but some gaps of its prompt."""
    chain = cache_of(full()).chain(range(num_prompt))
    request = Request(RequestId(0), chain, SamplingParams(), CacheOptions())
    request.found_gaps = tuple(gaps)
    request.reused_tokens = num_prompt - sum(map(len, gaps))
    return request


def costs_of_steps(num_steps: int, step_tokens: int = 100) -> StepCosts:
    """Costs learnt from steps that take exactly as long as COST says."""
    costs = StepCosts(None, step_tokens=step_tokens)
    for number in range(num_steps):
        spans = [Span(number * 10, number * 10 + 1 + number * 7 % 50)]
        costs.observe(spans, COST.seconds(spans))
    return costs


@pytest.mark.parametrize(
    ("gaps", "num_steps_saved", "reused"),
    [
        ([Span(240, 250)], 2, [Span(0, 240)]),
        ([Span(0, 10), Span(200, 250)], 2, [Span(10, 200)]),
        ([Span(0, 110), Span(120, 250)], 0, [Span(110, 120)]),
    ],
)
def test_what_was_saved_is_what_it_would_have_cost(
    gaps: Sequence[Span], num_steps_saved: int, reused: Sequence[Span]
) -> None:
    """By position, and by the steps that were not needed: of 250 tokens three, of 100 each."""
    saved_s = costs_of_steps(100).saved_s(request_with(gaps, 250))

    expected_s = COST.marginal_s(reused) + num_steps_saved * COST.fixed_s
    assert saved_s == pytest.approx(expected_s, rel=0.02)


def test_nothing_is_said_of_costs_that_are_not_known() -> None:
    """A few steps are not enough, unless what they cost was measured before."""
    request = request_with([Span(10, 20)], 20)
    spec = cache_of(full()).cache.spec
    chooser = Chooser(spec, [], step_tokens=100)
    chooser.start_from(Calibration(compute=COST))

    assert costs_of_steps(3).saved_s(request) is None
    measured = StepCosts(chooser, step_tokens=100).saved_s(request)
    assert measured == pytest.approx(COST.marginal_s([Span(0, 10)]))


def test_costs_follow_what_steps_take() -> None:
    """A machine that gets ten times slower saves ten times as much by reuse."""
    costs, request = costs_of_steps(100), request_with([Span(240, 250)], 250)
    before_s = costs.saved_s(request)
    for number in range(2000):
        spans = [Span(number % 100 * 10, number % 100 * 10 + 1 + number * 7 % 50)]
        costs.observe(spans, 10 * COST.seconds(spans))
    after_s = costs.saved_s(request)

    assert before_s is not None
    assert after_s == pytest.approx(10 * before_s, rel=0.1)


def test_what_did_not_come_from_a_tier_was_not_saved() -> None:
    """Blocks that failed to load are computed: they lie between those that were reused."""
    with small(FaultyHost(faults=(Fault("fail", "get", calls=[2, 3]),))) as llm:
        receipt_of(llm)
        llm.cache.offload()
        request_id = llm.engine.add(PROMPT, GREEDY, CacheOptions())
        (request,) = [one for one in llm.engine._request_to_output if one.request_id == request_id]
        ((*_, last),) = pieces_of(llm.engine, request_id)

    assert last.receipt is not None
    assert last.receipt.load_failures == {"unavailable": 2}
    assert sum(map(len, request.reused_spans)) == last.receipt.reused_tokens
    assert last.receipt.reused_tokens == len(PROMPT) - 2 * SIZE - 1


def test_a_receipt_says_what_was_saved(llm: LLM) -> None:
    """Nothing for a prompt that is new, something for one that is not, once there were a few steps."""
    first, second = receipt_of(llm), receipt_of(llm)
    third = receipt_of(llm, PROMPT[::-1])

    assert first.saved_s is None
    assert second.saved_s is not None
    assert second.saved_s > 0
    assert third.saved_s == 0


# --- the first piece -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_the_first_piece_tells_what_was_reused(llm: LLM, num_outputs: int) -> None:
    """Once for a request, however many outputs it has; it is what its receipt says in the end."""
    receipt_of(llm, PROMPT[:-20])
    params = SamplingParams(n=num_outputs, max_tokens=4, seed=1, ignore_eos=True)
    (pieces,) = pieces_of(llm.engine, llm.engine.add(PROMPT, params, CacheOptions()))

    assert pieces[-1].receipt is not None
    told = [piece.reused_tokens for piece in pieces]
    assert told == [pieces[-1].receipt.reused_tokens] + [None] * (len(pieces) - 1)
    assert told[0] == 40


def test_a_request_that_never_began_has_reused_nothing(llm: LLM) -> None:
    """Its only piece says so."""
    receipt_of(llm)
    (piece,) = llm.engine.abort(llm.engine.add(PROMPT, GREEDY, CacheOptions()))

    assert piece.reused_tokens == 0
