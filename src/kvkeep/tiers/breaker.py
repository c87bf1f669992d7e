"""A circuit breaker: what failed several times is left alone for a while, then tried once, then used again.

    closed ──failures──> open ──pause over──> half open ──probe succeeds──> closed
                           ^                      │
                           └──probe fails: longer─┘

Pure bookkeeping: it calls nothing, and its clock is given. Any thread may call any method.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from time import monotonic

from kvkeep.errors import ConfigError

__all__ = ["Breaker", "BreakerRules", "BreakerState", "BreakerStats", "Permit"]

_LOGGER = logging.getLogger(__name__)


class BreakerState(StrEnum):
    """What a breaker lets through."""

    CLOSED = "closed"  # everything
    OPEN = "open"  # nothing until the pause is over
    HALF_OPEN = "half open"  # one probe


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerRules:
    """When it opens and for how long.

    Opens after `max_failures` in a row, or when of the last `window` calls at least `max_share` failed. The
    pause is `first_pause_s`, and `growth` times longer after each probe that fails, up to `max_pause_s`.
    """

    max_failures: int = 3
    window: int = 20
    max_share: float = 0.5
    first_pause_s: float = 0.5
    growth: float = 2.0
    max_pause_s: float = 30.0

    def __post_init__(self) -> None:
        for field in ("max_failures", "window"):
            value = getattr(self, field)
            if value < 1:
                raise ConfigError(f"{field}={value!r} is not positive; give at least 1")
        if not 0 < self.max_share <= 1:
            raise ConfigError(
                f"max_share={self.max_share!r} is no share; give more than 0, up to 1"
            )
        if not 0 < self.first_pause_s <= self.max_pause_s:
            raise ConfigError(
                f"first_pause_s={self.first_pause_s!r} is not between 0 and "
                f"max_pause_s={self.max_pause_s!r}; give a shorter pause"
            )
        if self.growth < 1:
            raise ConfigError(f"growth={self.growth!r} shortens pauses; give at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerStats:
    """Where a breaker stands, and counts since its start.

    `num_refused` calls were not made because it was open; `reason` is that of the last failure.
    """

    name: str
    state: BreakerState
    reason: str
    num_openings: int
    num_failures: int
    num_refused: int


class Permit:
    """Leave to make one call; ends with exactly one of its methods."""

    __slots__ = ("_breaker", "_era")

    def __init__(self, breaker: "Breaker", era: int) -> None:
        self._breaker = breaker
        self._era = era

    def succeed(self) -> None:
        """The medium answered, whatever it said."""
        self._breaker.record_success(self, self._era)

    def fail(self, reason: str) -> None:
        """The medium did not answer, or says that it cannot serve."""
        self._breaker.record_failure(self._era, reason)

    def abandon(self) -> None:
        """The call was not made, or says nothing about the medium."""
        self._breaker.record_nothing(self._era)


class Breaker:
    """One medium's breaker. Logs a warning when it opens and a line when it closes, once per outage."""

    def __init__(
        self,
        name: str,
        rules: BreakerRules | None = None,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.name = name
        self._rules = BreakerRules() if rules is None else rules
        self._clock = clock
        self._lock = Lock()
        self._state = BreakerState.CLOSED
        # Grows with every change of state, so that a call from before says nothing about now.
        self._era = 0
        # While it is closed the same one is for all.
        self._permit: Permit | None = Permit(self, self._era)
        self._failures_in_row = 0
        self._recent: deque[bool] = deque(maxlen=self._rules.window)
        self._pause_s = self._rules.first_pause_s
        self._retry_at_s = 0.0
        self._reason = ""
        self._num_openings = 0
        self._num_failures = 0
        self._num_refused = 0

    @property
    def state(self) -> BreakerState:
        """What it lets through; an open one becomes half open when it admits the probe."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the last call failed."""
        return self._reason

    @property
    def is_resting(self) -> bool:
        """Whether a call would be refused now."""
        return self._state is not BreakerState.CLOSED and self._clock() < self._retry_at_s

    def admit(self) -> Permit | None:
        """Leave to make a call, or None while the medium is left alone.

        After a pause one caller gets it, for the probe; when that one is lost, another after the same pause.
        """
        permit = self._permit
        if permit is not None:
            return permit
        with self._lock:
            if self._permit is None:
                now_s = self._clock()
                if now_s < self._retry_at_s:
                    self._num_refused += 1
                    return None
                self._move(BreakerState.HALF_OPEN)
                self._retry_at_s = now_s + self._pause_s
            return self._permit or Permit(self, self._era)

    def trip(self, reason: str) -> None:
        """Open at once, as after many failures; where it is open already nothing happens."""
        with self._lock:
            self._num_failures += 1
            self._reason = reason
            if self._state is BreakerState.CLOSED:
                self._open()

    def record_success(self, permit: Permit, era: int) -> None:
        """Called by permits."""
        if permit is self._permit and not self._failures_in_row:
            # The usual case, and nothing in it needs the lock.
            self._recent.append(False)
            return
        with self._lock:
            if era != self._era:
                return
            self._failures_in_row = 0
            self._recent.append(False)
            if self._state is BreakerState.HALF_OPEN:
                self._move(BreakerState.CLOSED)
                self._pause_s = self._rules.first_pause_s
                _LOGGER.info("%s answers again", self.name)

    def record_failure(self, era: int, reason: str) -> None:
        """Called by permits."""
        with self._lock:
            self._num_failures += 1
            self._reason = reason
            if era != self._era:
                return
            self._failures_in_row += 1
            self._recent.append(True)
            if self._state is BreakerState.HALF_OPEN:
                self._pause_s = min(self._pause_s * self._rules.growth, self._rules.max_pause_s)
                self._pause()
            elif self._fails_too_often():
                self._open()

    def record_nothing(self, era: int) -> None:
        """Called by permits."""
        with self._lock:
            if era == self._era and self._state is BreakerState.HALF_OPEN:
                self._move(BreakerState.OPEN)
                self._retry_at_s = self._clock()

    def stats(self) -> BreakerStats:
        """State and counts."""
        with self._lock:
            return BreakerStats(
                name=self.name,
                state=self._state,
                reason=self._reason,
                num_openings=self._num_openings,
                num_failures=self._num_failures,
                num_refused=self._num_refused,
            )

    def _fails_too_often(self) -> bool:
        if self._failures_in_row >= self._rules.max_failures:
            return True
        is_full = len(self._recent) == self._rules.window
        return is_full and sum(self._recent) >= self._rules.max_share * self._rules.window

    def _open(self) -> None:
        self._num_openings += 1
        self._pause()
        _LOGGER.warning(
            "%s is left alone until it answers again: %s; next try in %g s",
            self.name, self._reason, self._pause_s,
        )  # fmt: skip

    def _pause(self) -> None:
        self._move(BreakerState.OPEN)
        self._retry_at_s = self._clock() + self._pause_s

    def _move(self, state: BreakerState) -> None:
        self._state = state
        self._era += 1
        self._permit = Permit(self, self._era) if state is BreakerState.CLOSED else None
        self._failures_in_row = 0
        self._recent.clear()
