"""The scheduler over a cache whose blocks name their tokens: who runs when, and that all end."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.cache import PinId
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.scheduling import Request, RequestStatus, Scheduler, StepPlan
from kvkeep.spec import GroupSpec, RequestId
from tests.content_store import (
    EVERY_MODEL,
    CheckedCache,
    chunked,
    full,
    recurrent,
    sliding,
    spec_of,
)

BLOCK_SIZE = 4


class Server:
    """Steps a scheduler as an engine does, with token 0 chosen always."""

    def __init__(
        self,
        *groups: GroupSpec,
        num_blocks: int | Sequence[int] = 4000,
        max_batch_tokens: int = 64,
        max_requests: int = 16,
    ) -> None:
        spec = spec_of(*(groups or (full(),)), block_size=BLOCK_SIZE)
        each = [num_blocks] * len(spec.groups) if isinstance(num_blocks, int) else num_blocks
        self.checked = CheckedCache(spec, each)
        self.cache = self.checked.cache
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=max_batch_tokens, max_requests=max_requests
        )
        self.max_batch_tokens = max_batch_tokens
        self.requests: list[Request] = []
        self.computed: Counter[int] = Counter()
        # Numbers of the steps in which a request got a token.
        self.token_steps: dict[int, list[int]] = {}
        self.num_steps = 0

    def add(self, token_ids: Sequence[int], max_tokens: int = 4, **options: Any) -> Request:
        """Queue a prompt."""
        request = Request(
            RequestId(len(self.requests)),
            self.checked.chain(token_ids),
            SamplingParams(max_tokens=max_tokens),
            CacheOptions(**options),
        )
        self.requests.append(request)
        self.token_steps[request.request_id] = []
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        """Plan, check the plan, compute, commit, choose."""
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.max_batch_tokens
        assert len({work.request for work in plan.work}) == len(plan.work)
        assert not {work.request for work in plan.work}.intersection(plan.preempted)
        for work in plan.work:
            self.checked.write(work.request.held_lease(), work.spans)
        for work in plan.work:
            self.checked.read(work.request.held_lease(), work.spans)
        for work in plan.work:
            request, lease = work.request, work.request.held_lease()
            assert work.is_last == (work.spans[-1].stop == len(request.chain))
            self.computed[request.request_id] += sum(len(span) for span in work.spans)
            self.cache.commit(lease, work.spans)
            self.checked.check_lease(lease)
            if work.is_last:
                self._choose(request)
        self.num_steps += 1
        assert self.cache.verify().problems == ()
        return plan

    def _choose(self, request: Request) -> None:
        self.token_steps[request.request_id].append(self.num_steps)
        request.held_lease().append([0])
        if request.num_output >= request.params.max_tokens:
            self.scheduler.finish(request)

    def is_idle(self) -> bool:
        """Whether nobody waits or runs."""
        return self.scheduler.num_waiting + self.scheduler.num_running == 0

    def run(self, most_steps: int = 2000) -> None:
        """Step until all have ended; each step must compute something."""
        while not self.is_idle():
            assert self.step().work, "nobody runs although somebody waits"
            assert self.num_steps <= most_steps
        assert self.cache.stats().in_use_bytes == 0


def tokens(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(1, 1000) for _ in range(length)]


def test_a_step_never_exceeds_the_budget_and_uses_all_of_it_when_it_can() -> None:
    """Prompts that exceed the budget many times fill every step but the last ones."""
    server = Server(max_batch_tokens=50)
    for seed in range(6):
        server.add(tokens(97, seed), max_tokens=1)

    assert [server.step().num_tokens for _ in range(6)] == [50] * 6
    server.run()


def test_decoding_requests_are_planned_before_gaps() -> None:
    """A request that needs one token gets it in every step, whatever arrives."""
    server = Server(max_batch_tokens=16)
    decoding = server.add(tokens(5), max_tokens=50)
    server.step()
    for seed in range(1, 10):
        server.add(tokens(300, seed), max_tokens=2)

    for _ in range(49):
        server.step()

    assert server.token_steps[decoding.request_id] == list(range(50))


def test_gaps_beside_a_decoding_request_get_a_share_of_the_budget_only() -> None:
    """A step that carries a stream's next token stays short."""
    server = Server(max_batch_tokens=64)
    server.add(tokens(5), max_tokens=50)
    server.step()
    server.add(tokens(10_000, 1))

    assert [server.step().num_tokens for _ in range(5)] == [1 + 64 // 4] * 5


def test_a_short_prompt_behind_a_very_long_one_gets_its_first_token_soon() -> None:
    """10 000 tokens before it delay it by a few steps, not by 150."""
    server = Server(max_batch_tokens=64)
    server.add(tokens(10_000))
    server.step()
    short = server.add(tokens(20, 1))

    for _ in range(3):
        server.step()

    assert short.num_output >= 1


def test_requests_with_equal_prompts_wait_for_the_first_and_share() -> None:
    """Sixteen equal prompts of 80 tokens cost one, and a last token each."""
    server = Server()
    for _ in range(16):
        server.add(tokens(80), max_tokens=1)

    server.run()

    assert sum(server.computed.values()) <= 80 + 15 * BLOCK_SIZE
    assert server.computed[0] == 80


def test_requests_that_differ_early_do_not_wait_for_each_other() -> None:
    """Only what would be computed twice waits: another prompt is in the same step."""
    server = Server()
    server.add(tokens(40))
    server.add(tokens(40))
    server.add(tokens(40, 1))

    assert [work.request.request_id for work in server.step().work] == [0, 2]


@pytest.mark.parametrize("option", ["read", "write"])
def test_a_request_that_shares_nothing_neither_waits_nor_is_waited_for(option: str) -> None:
    """Reading off: the second computes at once. Writing off: nobody waits for what stays private."""
    server = Server()
    server.add(tokens(40), write=option != "write")
    server.add(tokens(40), read=option != "read")

    assert len(server.step().work) == 2
    server.run()
    assert server.computed == {0: 43, 1: 43}


def test_who_waits_for_an_aborted_request_computes_itself() -> None:
    """The first of two equal requests is ended in its middle; the second goes on from there."""
    server = Server(max_batch_tokens=16)
    first, second = server.add(tokens(80)), server.add(tokens(80))
    server.step()
    server.step()
    server.scheduler.finish(first)

    server.run()

    assert second.num_output == 4
    assert server.computed[second.request_id] == 80 - 32 + 3


def test_the_youngest_is_preempted_first_and_resumes() -> None:
    """Two that do not fit together: the older one is never touched, both finish."""
    server = Server(num_blocks=12)
    older, younger = server.add(tokens(20), max_tokens=20), server.add(tokens(20, 1), max_tokens=20)

    server.run()

    assert older.num_preemptions == 0
    assert younger.num_preemptions >= 1
    assert (older.num_output, younger.num_output) == (20, 20)


def test_a_preempted_request_goes_before_those_that_came_later() -> None:
    """Preemption keeps the order of arrival."""
    server = Server(num_blocks=12, max_requests=2)
    for seed in range(4):
        server.add(tokens(20, seed), max_tokens=20)

    server.run()

    last_steps = [server.token_steps[number][-1] for number in range(4)]
    assert last_steps == sorted(last_steps)
    assert server.requests[1].num_preemptions >= 1


def test_what_is_computed_again_after_a_preemption_is_counted_once() -> None:
    """Reused, computed and recomputed tokens of all requests add up to what the cache computed."""
    server = Server(num_blocks=14, max_batch_tokens=8)
    for seed in range(5):
        server.add(tokens(20, seed), max_tokens=20)

    server.run()

    assert sum(request.num_preemptions for request in server.requests) >= 2
    for request in server.requests:
        assert request.reused_tokens is not None
        once = request.num_prompt - request.reused_tokens + request.num_output - 1
        assert server.computed[request.request_id] == once + request.recomputed_tokens


def test_several_gaps_of_one_request_are_computed_in_one_step() -> None:
    """Holes in a known prompt are spans of one step."""
    server = Server()
    server.add(tokens(40), max_tokens=1)
    server.run()
    chain = server.checked.chain(tokens(40))
    server.cache.drop(chain, [1, 4, 7])
    server.add(tokens(40), max_tokens=1)

    (work,) = server.step().work

    assert [(span.start, span.stop) for span in work.spans] == [
        (4, 8),
        (16, 20),
        (28, 32),
        (39, 40),
    ]


@pytest.mark.parametrize("status", ["waiting", "mid-prompt", "decoding", "preempted", "finished"])
def test_finishing_gives_everything_back_in_every_state(status: str) -> None:
    """Wherever a request is when it is ended, no block stays held and others go on."""
    server = Server(max_batch_tokens=16, max_requests=1)
    other = server.add(tokens(8, 1), max_tokens=2) if status == "waiting" else None
    request = server.add(tokens(40), max_tokens=2 if status == "finished" else 20)
    num_steps = {"waiting": 1, "mid-prompt": 1, "decoding": 4, "preempted": 4, "finished": 9}
    for _ in range(num_steps[status]):
        server.step()
    if status == "preempted":
        server.scheduler._running.remove(request)
        request.preempt()
        server.scheduler._waiting.append(request)

    if status != "finished":
        server.scheduler.finish(request)

    assert request.status is RequestStatus.FINISHED
    assert request.lease is None
    server.run()
    assert other is None or other.num_output == 2
    assert server.cache.stats().open_leases == 0


def test_first_come_is_first_served_under_a_stream_of_small_requests() -> None:
    """A large request is not overtaken for ever by small ones that arrive in every step."""
    server = Server(num_blocks=40, max_batch_tokens=16, max_requests=4)
    for seed in range(4):
        server.add(tokens(12, seed), max_tokens=8)
    large = server.add(tokens(120, 99), max_tokens=4)

    for seed in range(100, 160):
        server.add(tokens(12, seed), max_tokens=8)
        server.step()

    assert large.status is RequestStatus.FINISHED
    server.run()


def test_no_more_requests_run_than_there_are_seats() -> None:
    """max_requests bounds the leases at any time."""
    server = Server(max_requests=3)
    for seed in range(10):
        server.add(tokens(10, seed))

    while not server.is_idle():
        server.step()
        assert server.scheduler.num_running <= 3


def test_a_lone_request_that_holds_too_much_for_later_gaps_starts_afresh() -> None:
    """Known windows before several gaps can fill an arena that is large enough for one at a time."""
    server = Server(full(), sliding(6), num_blocks=[20, 8], max_batch_tokens=12)
    server.add(tokens(32), max_tokens=1)
    server.run()
    lost = [server.checked.ledgers[0].get(server.requests[0].chain.keys[at]) for at in (2, 5)]
    server.cache._places.forget(0, [block for block in lost if block is not None])
    request = server.add(tokens(33), max_tokens=4)

    server.run()

    assert request.num_output == 4


GROUPS: dict[str, Callable[[], list[GroupSpec]]] = {
    "full": lambda: [full()],
    "sliding": lambda: [sliding(6)],
    "full and sliding": lambda: [full(), sliding(5)],
    "full and chunked": lambda: [chunked(8), full()],
    "recurrent": lambda: [full(), recurrent()],
}


@pytest.mark.parametrize("kind", GROUPS)
@given(st.data())
def test_any_load_ends_with_every_token_right_and_nothing_held(
    kind: str, data: st.DataObject
) -> None:
    """Random prompts with common beginnings, arenas just large enough, and blocks lost on the way."""
    groups = GROUPS[kind]()
    budget = data.draw(st.integers(1, 12), label="budget")
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6), label="lengths")
    num_output = data.draw(st.integers(1, 6), label="output")
    roomy = Server(*groups)
    needed = roomy.cache.blocks_needed(max(lengths) + num_output, budget)
    spare = data.draw(st.integers(0, 6), label="spare")
    server = Server(
        *groups,
        num_blocks=[need + spare for need in needed],
        max_batch_tokens=budget,
        max_requests=data.draw(st.integers(1, 4), label="seats"),
    )
    for length in lengths:
        common = tokens(data.draw(st.integers(0, length), label="common"))
        server.add((common + tokens(length, len(server.requests) + 1))[:length], num_output)
    while not server.is_idle():
        for _ in range(data.draw(st.integers(1, 30), label="steps")):
            if not server.is_idle():
                assert server.step().work, "nobody runs although somebody waits"
        assert server.num_steps < 3000
        victim = data.draw(st.sampled_from(server.requests), label="loses blocks").chain
        if victim.keys:
            numbers = st.lists(st.integers(0, len(victim.keys) - 1), max_size=4)
            server.cache.drop(victim, data.draw(numbers, label="dropped"))

    assert [request.num_output for request in server.requests] == [num_output] * len(lengths)
    assert server.cache.stats().in_use_bytes == 0


@EVERY_MODEL
def test_pins_yield_what_one_request_lacks(groups: tuple[GroupSpec, ...]) -> None:
    """Alone and without room it takes some of another's pins, not all; smaller ones then take none."""
    server = Server(*groups, num_blocks=61)
    prompt, admin = tokens(24, 1), server.cache.administration
    requests = [
        prompt,
        tokens(24, 2),
        # Its own beginning is pinned, and of the other six blocks it lacks four.
        [*prompt, *tokens(53 * BLOCK_SIZE - 1, 3)],
        *(tokens(48, seed) for seed in range(10, 20)),
    ]
    for number, token_ids in enumerate(requests):
        server.add(token_ids, max_tokens=1)
        while not server.is_idle():
            server.step()
        if number < 2:
            admin.pin(PinId(str(number)), server.checked.chain(token_ids))

    ledger = server.checked.ledgers[0]
    kept = [
        sum(ledger.get(key) is not None for key in server.checked.chain(token_ids).keys)
        for token_ids in requests[:2]
    ]
    assert kept == [6, 2] if ledger.spec.window is None else any(kept)
