"""Made-up traces of three workloads: chat, agent loops, questions about documents (docs/traces.md)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random

from kvkeep.errors import ConfigError
from kvkeep.replay.trace import BLOCK_TOKENS, TraceRequest

__all__ = ["WORKLOADS", "LogNormal", "Workload", "generate"]


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Values around `median`; `sigma` is the standard deviation of their logarithm."""

    median: float
    sigma: float

    def draw(self, rng: Random) -> float:
        """A value."""
        return rng.lognormvariate(math.log(self.median), self.sigma)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sessions that begin at random times, each with one of `num_beginnings` shared beginnings.

    Beginnings (system prompts, tools, documents) are chosen by Zipf's law: the n-th most popular one with a
    weight of `1 / n ** popularity`. A session has turns, geometrically many with the mean `num_turns`, which
    follow each other after gaps; the first input is longer by `opening_tokens`. With `keeps_history` a
    turn's input has all that was said before in it, and the session ends where it would be longer than
    `most_tokens`.
    """

    num_beginnings: int
    popularity: float
    beginning_tokens: LogNormal
    opening_tokens: LogNormal | None
    input_tokens: LogNormal
    output_tokens: LogNormal
    num_turns: float
    gap_s: LogNormal
    sessions_per_s: float
    most_tokens: int
    keeps_history: bool = True


# Where the numbers come from: docs/traces.md.
WORKLOADS = {
    "chat": Workload(
        num_beginnings=200,
        popularity=1.0,
        beginning_tokens=LogNormal(1500, 0.8),
        opening_tokens=None,
        input_tokens=LogNormal(150, 1.2),
        output_tokens=LogNormal(300, 0.8),
        num_turns=5,
        gap_s=LogNormal(45, 1.1),
        sessions_per_s=1.0,
        most_tokens=32_768,
    ),
    "agent": Workload(
        num_beginnings=20,
        popularity=1.0,
        beginning_tokens=LogNormal(6500, 0.3),
        opening_tokens=LogNormal(2500, 0.8),
        input_tokens=LogNormal(1500, 0.8),
        output_tokens=LogNormal(250, 0.8),
        num_turns=33,
        gap_s=LogNormal(5.2, 1.18),
        sessions_per_s=0.1,
        most_tokens=131_072,
    ),
    "document": Workload(
        num_beginnings=1000,
        popularity=0.8,
        beginning_tokens=LogNormal(12_000, 0.9),
        opening_tokens=None,
        input_tokens=LogNormal(60, 0.8),
        output_tokens=LogNormal(200, 0.8),
        num_turns=4,
        gap_s=LogNormal(30, 1.0),
        sessions_per_s=0.5,
        most_tokens=131_072,
        keeps_history=False,
    ),
}


@dataclass(slots=True)
class _Session:
    beginning_tokens: int
    turns_left: int
    # Ids of full blocks that a later turn has again, and all tokens that it begins with.
    ids: list[int]
    num_tokens: int
    is_first_turn: bool = True


@dataclass(slots=True)
class _Beginnings:
    """The shared beginnings of a workload: how long each is, and the ids of its full blocks."""

    workload: Workload
    rng: Random
    ids: Iterator[int]
    weights: list[float] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    number_to_ids: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = 0.0
        for number in range(1, self.workload.num_beginnings + 1):
            total += number**-self.workload.popularity
            self.weights.append(total)

    def open_session(self) -> _Session:
        """A new session on a beginning that popularity chooses."""
        workload, rng = self.workload, self.rng
        (number,) = rng.choices(range(workload.num_beginnings), cum_weights=self.weights)
        if number not in self.lengths:
            # Half of the most tokens, so that there is room for turns.
            length = min(int(workload.beginning_tokens.draw(rng)), workload.most_tokens // 2)
            self.lengths[number] = length
            self.number_to_ids[number] = [next(self.ids) for _ in range(length // BLOCK_TOKENS)]
        num_turns = 1
        if workload.num_turns > 1:
            share_of_more = 1 - 1 / workload.num_turns
            num_turns += int(math.log(1 - rng.random()) / math.log(share_of_more))
        length = self.lengths[number]
        return _Session(length, num_turns, list(self.number_to_ids[number]), length)


def generate(workload: Workload, *, num_requests: int, seed: int) -> list[TraceRequest]:
    """The first `num_requests` requests of a workload, in order of time; the same for the same seed.

    Raises ConfigError when there are to be none.
    """
    if num_requests < 1:
        raise ConfigError(f"num_requests={num_requests!r} is not positive; give at least 1")
    rng = Random(seed)  # noqa: S311  chooses a workload, protects nothing
    ids = count()
    beginnings = _Beginnings(workload, rng, ids)
    order = count()
    # What happens when: a turn of a session, or, without one, the start of a new session.
    events: list[tuple[float, int, _Session | None]] = [(0.0, next(order), None)]
    requests: list[TraceRequest] = []
    while len(requests) < num_requests:
        now_s, _, session = heappop(events)
        if session is None:
            until_next_s = rng.expovariate(workload.sessions_per_s)
            heappush(events, (now_s + until_next_s, next(order), None))
            session = beginnings.open_session()
        request = _turn(workload, session, rng, ids, now_s)
        if request is None:
            continue
        requests.append(request)
        if session.turns_left:
            heappush(events, (now_s + workload.gap_s.draw(rng), next(order), session))
    return requests


def _turn(
    workload: Workload, session: _Session, rng: Random, ids: Iterator[int], now_s: float
) -> TraceRequest | None:
    """The session's next request, None where it would be too long, which ends the session."""
    new_tokens = 1 + int(workload.input_tokens.draw(rng))
    if session.is_first_turn and workload.opening_tokens is not None:
        new_tokens += int(workload.opening_tokens.draw(rng))
    output_tokens = 1 + int(workload.output_tokens.draw(rng))
    input_tokens = session.num_tokens + new_tokens
    if input_tokens + output_tokens > workload.most_tokens:
        if not session.is_first_turn:
            return None
        input_tokens = min(input_tokens, workload.most_tokens // 2)
        output_tokens = min(output_tokens, workload.most_tokens // 2)
    session.is_first_turn = False
    session.turns_left -= 1
    num_missing = input_tokens // BLOCK_TOKENS - len(session.ids)
    hash_ids = session.ids + [next(ids) for _ in range(num_missing)]
    if workload.keeps_history:
        session.ids = hash_ids
        session.num_tokens = input_tokens + output_tokens
    is_partial = input_tokens % BLOCK_TOKENS != 0
    return TraceRequest(
        timestamp_ms=round(now_s * 1000),
        input_length=input_tokens,
        output_length=output_tokens,
        hash_ids=(*hash_ids, next(ids)) if is_partial else tuple(hash_ids),
    )
