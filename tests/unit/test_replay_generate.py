"""Made-up traces are what their workload says, and the same for the same seed."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from kvkeep.errors import ConfigError
from kvkeep.replay import (
    WORKLOADS,
    TraceRequest,
    generate,
    ideal_hits,
    read_trace,
    visits_of,
    write_trace,
)

EVERY_WORKLOAD = pytest.mark.parametrize("name", WORKLOADS)


def made(name: str, num_requests: int = 2000, seed: int = 0) -> list[TraceRequest]:
    """Requests of a workload."""
    return generate(WORKLOADS[name], num_requests=num_requests, seed=seed)


def sessions(requests: list[TraceRequest]) -> list[list[TraceRequest]]:
    """Requests by session: each is found in the one whose longest chain it goes on with."""
    tip_to_session: dict[int, list[TraceRequest]] = {}
    for request in requests:
        num_full = request.input_length // 512
        tips = [one for one in request.hash_ids[:num_full] if one in tip_to_session]
        session = tip_to_session.pop(tips[-1]) if tips else []
        session.append(request)
        if num_full:
            tip_to_session[request.hash_ids[num_full - 1]] = session
    return list(tip_to_session.values())


@EVERY_WORKLOAD
def test_a_seed_makes_one_trace(name: str) -> None:
    """The same requests again, others for another seed, and a longer trace begins as a shorter one."""
    trace = made(name, 300)

    assert trace == made(name, 300)
    assert trace != made(name, 300, seed=1)
    assert made(name, 200) == trace[:200]


@EVERY_WORKLOAD
def test_a_made_up_trace_is_in_the_format(name: str, tmp_path: Path) -> None:
    """It is written and read as the public ones, in order of time, and an id has one id before it."""
    trace = made(name, 500)
    write_trace(tmp_path / "trace.jsonl", trace)

    assert read_trace(tmp_path / "trace.jsonl") == trace
    assert trace == sorted(trace, key=lambda request: request.timestamp_ms)
    before: dict[int, int] = {}
    for request in trace:
        for at, one in enumerate(request.hash_ids):
            assert before.setdefault(one, request.hash_ids[at - 1] if at else -1) == (
                request.hash_ids[at - 1] if at else -1
            )


@EVERY_WORKLOAD
def test_no_request_is_longer_than_the_context(name: str) -> None:
    """Input and output fit, and there is always some of both."""
    trace = made(name)

    assert all(one.input_length > 0 < one.output_length for one in trace)
    assert max(one.input_length + one.output_length for one in trace) <= WORKLOADS[name].most_tokens


def test_popular_beginnings_are_shared_more() -> None:
    """Of 200 prompts the most popular one begins every sixth chat, and most prompts begin few."""
    counts = Counter(
        request.hash_ids[0] for request in made("chat") if request.input_length >= 1024
    )
    shared = [count for _, count in counts.most_common()]

    assert 0.1 < shared[0] / sum(shared) < 0.25
    assert shared[0] > 10 * median(shared)


def test_a_conversation_grows_by_what_was_said() -> None:
    """A turn has the tokens of the turn before, its output and a message, at a later time."""
    longest = max(sessions(made("agent")), key=len)

    assert len(longest) > 20
    for one, other in pairwise(longest):
        num_kept = one.input_length // 512
        assert other.hash_ids[:num_kept] == one.hash_ids[:num_kept]
        assert other.input_length > one.input_length + one.output_length
        assert other.timestamp_ms > one.timestamp_ms


def test_agents_are_what_is_known_of_agents() -> None:
    """First inputs, growth a turn, turns, and the share that a cache without bound finds."""
    trace = made("agent", 8000)
    ended = [one for one in sessions(trace) if one[0].timestamp_ms < trace[-1].timestamp_ms / 2]
    growth = [
        other.input_length - one.input_length
        for session in ended
        for one, other in pairwise(session)
    ]
    keys = [visit.keys for visit in visits_of(trace, 512)]

    assert 10_000 < median(one[0].input_length for one in ended) < 15_000
    assert 1500 < median(growth) < 2500
    assert 0.85 < ideal_hits(keys) / sum(map(len, keys)) < 0.99


def test_questions_share_a_document_and_nothing_else() -> None:
    """Two questions on one document have its full blocks in common, up to the last one of it."""
    by_document: dict[int, list[TraceRequest]] = {}
    for request in made("document"):
        by_document.setdefault(request.hash_ids[0], []).append(request)
    most_asked = max(by_document.values(), key=len)
    chains = [set(request.hash_ids) for request in most_asked]
    common = set.intersection(*chains)

    assert len(most_asked) > 10
    assert all(len(chain - common) <= 4 for chain in chains)
    assert not (chains[0] - common) & (chains[1] - common)


def test_nothing_is_no_trace() -> None:
    """A trace has at least one request."""
    with pytest.raises(ConfigError, match="num_requests=0 is not positive"):
        made("chat", 0)
