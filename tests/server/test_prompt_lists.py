"""Lists of prompts take their seats together: all, or none now, or none ever."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError
from kvkeep.server.limits import Seats
from tests.running_server import RunningServer, running_server

_LONG = {"prompt": "Again and again. " * 4, "max_tokens": 7000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def small() -> Iterator[RunningServer]:
    """A server with three seats."""
    with running_server(llm_options={"max_requests": 2}, max_queued=1) as running:
        yield running


def test_prompts_of_one_request_take_their_seats_together() -> None:
    """All or none; what no job has taken of them is given back, what one has taken by the job."""
    one = Tenant(TenantId("one"), None, is_admin=False)
    seats = Seats(max_jobs=9, max_per_tenant=4)
    with seats.taken(one, num_outputs=2, num_prompts=2) as together:
        together.take(one, 2)
        with pytest.raises(ApiError) as later, seats.taken(one, 1, 1):
            pass
    assert (later.value.status, seats.num_taken) == (429, 2)

    with pytest.raises(ApiError) as part, seats.taken(one, num_outputs=1, num_prompts=3):
        pass
    assert (part.value.status, seats.num_taken) == (429, 2)
    together.give_back(one, 2)
    assert seats.num_taken == 0


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        (
            {"prompt": ["a", "b", "c"]},
            "max_requests_per_key=2; send the list in parts of at most 2",
        ),
        (
            {"prompt": [[7], [8]], "n": 2},
            "max_requests_per_key=2; send the list in parts of at most 1",
        ),
        ({"prompt": "a", "n": 3}, "max_requests_per_key=2; ask for fewer outputs"),
        ({"prompt": ["a"] * 8}, "7 at once; send the list in parts of at most 7"),
    ],
)
def test_a_list_that_never_fits_is_refused_for_good(body: dict[str, Any], remedy: str) -> None:
    """With the bound and the remedy; no client tries that again. A list that fits is answered."""
    with (
        running_server(
            llm_options={"max_requests": 5}, max_queued=2, max_requests_per_key=2
        ) as server,
        server.client() as client,
    ):
        refused = client.post("/v1/completions", json={"max_tokens": 1, **body})
        taken = client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
        assert server.service.seats.num_taken == 0

    assert (refused.status_code, taken.status_code) == (400, 200), refused.text
    assert remedy in refused.json()["error"]["message"]
    assert "retry-after" not in refused.headers


def test_a_list_without_room_now_runs_no_part(small: RunningServer) -> None:
    """Two of three seats are taken: of two prompts none begins, and the third seat stays free."""
    seats = small.service.seats
    with ExitStack() as streams, small.client() as client:
        for _ in range(2):
            one = streams.enter_context(small.client())
            streams.enter_context(one.stream("POST", "/v1/completions", json=_LONG))
        begun: list[str] = []
        small.service.begin_observers.append(lambda job: begun.append(job.route))
        refused = client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
        small.service.begin_observers.pop()

        assert (refused.status_code, begun, seats.num_taken) == (429, [], 2)
