"""What the settings of tiers on other machines must be."""

from kvkeep.errors import ConfigError

__all__ = ["check_count", "check_seconds"]

# Three years and more are a slip of the keyboard, and would overflow further on.
_MOST_SECONDS = 1e8


def check_seconds(field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a time."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < _MOST_SECONDS
    ):
        raise ConfigError(f"{field}={value!r} is no time; give seconds, more than 0")


def check_count(field: str, value: object, most: int) -> None:
    """Raise ConfigError unless `value` is a count from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{field}={value!r} is not from 1 to {most}; give a count")
