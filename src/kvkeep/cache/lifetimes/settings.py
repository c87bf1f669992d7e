"""Settings of lifetimes, for all requests that do not say otherwise."""

from dataclasses import dataclass
from math import inf
from typing import Self

from kvkeep.config import EngineSettings, parse_duration

__all__ = ["LifetimeSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LifetimeSettings:
    """Validated by EngineSettings, whose fields of these names they are.

    `pin_share` is the share of the device's blocks that pins may hold; `context_share` see relevance.
    """

    default_ttl_s: float = inf
    session_ttl_s: float = inf
    max_clock_skew_s: float = 0.0
    pin_share: float = 0.2
    context_share: float = 0.5

    @classmethod
    def of(cls, settings: EngineSettings) -> Self:
        """The settings of an engine."""
        return cls(
            default_ttl_s=_seconds("default_ttl", settings.default_ttl),
            session_ttl_s=_seconds("session_ttl", settings.session_ttl),
            max_clock_skew_s=settings.max_clock_skew_s,
            pin_share=settings.pin_share,
            context_share=settings.context_share,
        )


def _seconds(field: str, value: float | str | None) -> float:
    return inf if value is None else parse_duration(field, value)
