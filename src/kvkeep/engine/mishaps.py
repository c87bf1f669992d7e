"""What goes wrong beside an output is logged, and does not end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["outliving"]

_log = logging.getLogger(__name__)


@contextmanager
def outliving(what: str) -> Iterator[None]:
    """Go on behind the block when it fails; `what` is done there, as the log is to say it."""
    try:
        yield
    except Exception:  # noqa: BLE001  it is told in the log
        _log.exception("%s has failed", what)
