"""One request on its way through the server: what is asked, its pieces, and how it ended."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, time
from types import TracebackType
from typing import Self

from kvkeep.cache import Receipt
from kvkeep.cache.explain import Outline
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import FinishReason, Piece
from kvkeep.engine.async_engine import Submission
from kvkeep.server.auth import Tenant
from kvkeep.server.errors import ApiError
from kvkeep.server.limits import Seats, TakenSeats

__all__ = ["Finished", "Job", "JobStream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request to the engine, as a route hands it over.

    `options.salt` is the effective one: `tenant.salt_for(what the client sent)`. `explain`: the route wants
    to tell why blocks were missed. `outline` is what the prompt is made of, for that and for later requests.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    options: CacheOptions
    tenant: Tenant
    request_id: str
    route: str = ""
    explain: bool = False
    outline: Outline | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A job that has ended, for observers: metrics, traces, logs.

    `receipt` is None when the client left before the end, or time was up (`is_late`). `finish_reasons` are
    those of the outputs that ended. Times are as the server saw them: `waited_s` from arrival to the first
    piece, `token_gaps_s` between two pieces of the same output, `total_s` from arrival to the end.
    """

    job: Job
    receipt: Receipt | None
    finish_reasons: tuple[FinishReason, ...]
    started_at: float  # wall clock, seconds
    waited_s: float | None
    token_gaps_s: tuple[float, ...]
    total_s: float
    is_late: bool = False


class JobStream(AsyncIterator[Piece]):
    r"""Pieces of one job; enter it first. The last piece has the receipt.

    Entering raises ApiError 429 when there are too many jobs, EngineDownError when the engine takes none, and
    RequestError or CapacityError for a job that it refuses; the app turns all of them into responses.
    Iterating raises ApiError 504 when the time of the request is up, EngineDownError when the engine fails.
    Leaving aborts what still runs, without waiting. For one task at a time.

    `ready` waits for a piece without taking it, to send something meanwhile; `take` gives all that are there:

        while not await stream.ready(service.settings.keep_alive_s):
            yield ": keep-alive\n\n"
        pieces = stream.take()
    """

    def __init__(
        self,
        job: Job,
        submission: Submission,
        *,
        seats: Seats | TakenSeats,
        timeout_s: float,
        finished: Callable[[Finished], None],
    ) -> None:
        self.job = job
        self.receipt: Receipt | None = None
        self._submission = submission
        self._seats = seats
        self._timeout_s = timeout_s
        self._finished = finished
        self._timer: asyncio.TimerHandle | None = None
        self._started_at = time()
        self._started_s = perf_counter()
        self._waited_s: float | None = None
        self._choice_to_last_s: dict[int, float] = {}
        self._token_gaps_s: list[float] = []
        self._finish_reasons: list[FinishReason] = []
        self._is_late = False

    async def __aenter__(self) -> Self:
        self._seats.take(self.job.tenant, self.job.params.n)
        try:
            await self._submission.__aenter__()
        except BaseException:
            self._seats.give_back(self.job.tenant, self.job.params.n)
            raise
        # One timer for the whole request; one for every token would cost more than the token.
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._time_is_up)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Without awaiting: a cancelled task could not.
        assert self._timer is not None
        self._timer.cancel()
        self._submission.leave()
        self._seats.give_back(self.job.tenant, self.job.params.n)
        self._finished(
            Finished(
                job=self.job,
                receipt=self.receipt,
                finish_reasons=tuple(self._finish_reasons),
                started_at=self._started_at,
                waited_s=self._waited_s,
                token_gaps_s=tuple(self._token_gaps_s),
                total_s=perf_counter() - self._started_s,
                is_late=self._is_late,
            )
        )

    def ready(self, timeout_s: float) -> Awaitable[bool]:
        """Wait until a piece is there, or the end; False when neither came in time. Takes nothing."""
        return self._submission.ready(timeout_s)

    def take(self) -> list[Piece]:
        """The pieces that are there, without waiting; none at the end. Raises as iterating does."""
        pieces = self._submission.take()
        for piece in pieces:
            self._note(piece)
        return pieces

    def divert(self, sink: Callable[[Piece], bool]) -> None:
        """Give pieces to `sink` as they come; see Submission.divert."""

        def noted(piece: Piece) -> bool:
            is_taken = sink(piece)
            if is_taken:
                self._note(piece)
            return is_taken

        self._submission.divert(noted)

    async def __anext__(self) -> Piece:
        piece = await self._submission.__anext__()
        self._note(piece)
        return piece

    def _note(self, piece: Piece) -> None:
        now_s = perf_counter()
        if self._waited_s is None:
            self._waited_s = now_s - self._started_s
        if piece.token_ids:
            last_s = self._choice_to_last_s.get(piece.choice)
            if last_s is not None:
                self._token_gaps_s.append(now_s - last_s)
            self._choice_to_last_s[piece.choice] = now_s
        if piece.finish_reason is not None:
            self._finish_reasons.append(piece.finish_reason)
        if piece.receipt is not None:
            self.receipt = piece.receipt

    def _time_is_up(self) -> None:
        self._is_late = True
        self._submission.interrupt(
            ApiError(
                504,
                f"the request was not finished within request_timeout_s={self._timeout_s:g}; ask for "
                "less, or try again later",
                code="timeout",
                # The same again would take as long.
                headers={"x-should-retry": "false"},
            )
        )
