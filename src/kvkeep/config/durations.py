"""Lengths of time as people write them: seconds, "90s", "30m", "1h", "7d", or "never"."""

import re
from math import inf

from kvkeep.errors import ConfigError

__all__ = ["parse_duration"]

_UNIT_TO_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_WRITTEN = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(ms|s|m|h|d|w)?", re.ASCII)


def parse_duration(field: str, value: object) -> float:
    """Seconds, 0 or more; infinite for "never". Raises ConfigError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # NaN compares false with everything.
        if value >= 0:
            return _as_float(field, value)
    elif isinstance(value, str):
        text = value.strip().lower()
        if text == "never":
            return inf
        match = _WRITTEN.fullmatch(text)
        if match:
            return float(match[1]) * _UNIT_TO_SECONDS[match[2] or "s"]
    raise ConfigError(
        f'{field}={value!r:.80} is no length of time; give seconds, "90s", "30m", "1h", "7d" or "never"'
    )


def _as_float(field: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f'{field} is too long a time; give "never" for no end') from error
