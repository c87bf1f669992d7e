"""What one request asks of the cache."""

from dataclasses import dataclass

from kvkeep.errors import ConfigError

__all__ = ["CacheOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What one request asks of the cache.

    `salt` isolates: blocks are shared only between requests of equal salt. `read=False` recomputes
    everything; `write=False` leaves nothing behind for others.
    """

    salt: str | None = None
    read: bool = True
    write: bool = True

    def __post_init__(self) -> None:
        if self.salt is not None and not isinstance(self.salt, str):
            raise ConfigError(f"salt={self.salt!r} is not a string; give text, or None to share")
        for field in ("read", "write"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"{field}={getattr(self, field)!r} is not a bool; give True or False"
                )
