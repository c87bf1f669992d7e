"""A medium that failed is left alone for a while, then tried again: one warning, however often it fails."""

import logging
from collections.abc import Callable
from threading import Lock
from time import monotonic

__all__ = ["Switch"]

_LOGGER = logging.getLogger(__name__)


class Switch:
    """On until something failed, then off for `pause_s`, then on trial. Thread-safe.

    `what` is what it switches, as it reads in the log: one warning when it goes off, one note when it is on
    again. `num_outages` counts the warnings.
    """

    def __init__(
        self, what: str, pause_s: float, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self.num_outages = 0
        self._what = what
        self._pause_s = pause_s
        self._clock = clock
        self._lock = Lock()
        self._is_failing = False
        self._tried_at = 0.0

    @property
    def is_off(self) -> bool:
        """Whether nothing may be tried now."""
        return self._is_failing and self._clock() < self._tried_at + self._pause_s

    @property
    def is_on_trial(self) -> bool:
        """Whether it failed and nothing has worked since."""
        return self._is_failing

    def failed(self, error: OSError) -> None:
        """The medium failed: off from now."""
        with self._lock:
            is_first, self._is_failing = not self._is_failing, True
            self._tried_at = self._clock()
            self.num_outages += is_first
        if is_first:
            _LOGGER.warning("%s: off for now, tried again every %g s: %s",
                            self._what, self._pause_s, error)  # fmt: skip

    def worked(self) -> None:
        """The medium works."""
        if self._is_failing:
            with self._lock:
                was_failing, self._is_failing = self._is_failing, False
            if was_failing:
                _LOGGER.info("%s: on again", self._what)
