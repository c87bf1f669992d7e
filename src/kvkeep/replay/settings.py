"""What a trace is replayed over: a device, and the tiers below it."""

from dataclasses import dataclass

from kvkeep.config import parse_bytes
from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError
from kvkeep.policies import make_policy
from kvkeep.replay.trace import BLOCK_TOKENS
from kvkeep.tiers.base import Occasion

__all__ = ["ReplaySettings", "ReplayTier", "parse_capacity", "parse_tier"]

_ALL = frozenset(Occasion)
# A disk wears out: it gets what was used twice, what rests, and what would be lost otherwise.
_KIND_TO_OCCASIONS = {
    "host": _ALL,
    "disk": frozenset({Occasion.REUSED, Occasion.IDLE, Occasion.EVICTED, Occasion.CLOSING}),
    "remote": frozenset({Occasion.FINISHED, Occasion.REUSED, Occasion.IDLE, Occasion.CLOSING}),
}
_OPTIONS = ("policy", "write_on")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayTier:
    """A tier to replay: its size, what goes first in it, and on which occasions it is written to."""

    name: str
    capacity_bytes: int
    policy: str = "lru"
    write_on: frozenset[Occasion] = _ALL


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySettings:
    """A device of `capacity_bytes` and what is below it, nearest first.

    A block is `block_tokens` tokens of `bytes_per_token`. A block that nobody used for `idle_s` of the
    trace's time leaves the device once a tier has it; None keeps it. `touches_copies` says whether a use on
    the device counts for copies in tiers.
    """

    capacity_bytes: int
    bytes_per_token: int
    block_tokens: int = BLOCK_TOKENS
    policy: str = "lru"
    tiers: tuple[ReplayTier, ...] = ()
    idle_s: float | None = None
    touches_copies: bool = True

    def __post_init__(self) -> None:
        for field in ("capacity_bytes", "bytes_per_token", "block_tokens", "idle_s"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigError(f"{field}={value!r} is not positive; give at least 1")
        for policy in (self.policy, *(tier.policy for tier in self.tiers)):
            make_policy(policy)  # raises ConfigError for a name that is none
        places = {"the device": self.capacity_bytes}
        places |= {tier.name: tier.capacity_bytes for tier in self.tiers}
        for name, size in places.items():
            if size < self.block_bytes:
                raise ConfigError(
                    f"capacity={size} of {name} is less than one block of {self.block_bytes} bytes; "
                    "give more, or fewer bytes_per_token"
                )

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block."""
        return self.block_tokens * self.bytes_per_token

    @property
    def num_blocks(self) -> int:
        """Blocks that the device holds."""
        return self.capacity_bytes // self.block_bytes

    @property
    def total_blocks(self) -> int:
        """Blocks that device and tiers hold together, when none lies in two places."""
        return self.num_blocks + sum(tier.capacity_bytes // self.block_bytes for tier in self.tiers)


def parse_capacity(text: str, *, field: str) -> int:
    """Bytes that `text`, as "10GB", means. Raises ConfigError, also for a share, which has no whole here."""
    if "%" in text:
        raise ConfigError(f'{field}={text!r} is a share of nothing here; write bytes or "10GB"')
    return parse_bytes(text, total_bytes=0, field=field)


def parse_tier(text: str) -> ReplayTier:
    """A tier written as NAME:SIZE, then options: "host:64GB", "disk:1TB?policy=slru&write_on=reused,evicted".

    What the name begins with, host, disk or remote, decides when it is written to, unless `write_on` says so.
    Raises ConfigError for what cannot be read.
    """
    place, _, query = text.partition("?")
    name, colon, size = place.rpartition(":")
    if not name or not colon:
        raise ConfigError(f'tier={text!r} is no tier; write a name and a size, as "host:64GB"')
    options = dict(part.partition("=")[::2] for part in query.split("&") if part)
    for option in options:
        if option not in _OPTIONS:
            hint = nearest_hint(option, _OPTIONS)
            raise ConfigError(f"tier={text!r} has the unknown option {option!r}; {hint}")
    occasions = next(
        (found for kind, found in _KIND_TO_OCCASIONS.items() if name.startswith(kind)), _ALL
    )
    if "write_on" in options:
        occasions = _parse_occasions(text, options["write_on"])
    return ReplayTier(
        name=name,
        capacity_bytes=parse_capacity(size, field=f"capacity of {name}"),
        policy=options.get("policy", "lru"),
        write_on=occasions,
    )


def _parse_occasions(text: str, names: str) -> frozenset[Occasion]:
    try:
        return frozenset(Occasion(name) for name in names.split(","))
    except ValueError as error:
        raise ConfigError(
            f"tier={text!r}: {error}; write_on takes {', '.join(Occasion)}, with commas between them"
        ) from error
