"""What is measured, in which order, and which engines are alive together.

Engines stay alive over the points of a stage, with room for the largest of them. The cheap stages come
first, so that a run that is cut short has a table all the same.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.peers.engines import ENGINES, FIELDS, Field
from benchmarks.shapes import Shape

__all__ = ["Decode", "FirstToken", "Heat", "Point", "Stage", "Unfit", "heats_of", "need_bytes"]

# Tokens an opening may generate, and what block sizes round up to, for each request.
_SPARE_TOKENS = 128
# A weight of 1 in the budget is this many tokens of context.
_TOKENS_OF_A_SHARE = 16384
_MOST_SHARES = 6.0


@dataclass(frozen=True, slots=True)
class Decode:
    """One token of each of `batch` requests behind `context` tokens."""

    batch: int
    context: int

    @property
    def label(self) -> str:
        """As the table names it."""
        return f"decode {self.batch} x {self.context}"

    @property
    def tokens(self) -> int:
        """Room that an engine needs."""
        return self.batch * (self.context + _SPARE_TOKENS)

    @property
    def shares(self) -> float:
        """Its part of the budget."""
        return min(_MOST_SHARES, 1 + self.batch * self.context / _TOKENS_OF_A_SHARE)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of a prompt of `prefix` tokens that are known and `new` ones that are not."""

    prefix: int
    new: int

    @property
    def label(self) -> str:
        """As the table names it."""
        if self.prefix:
            return f"first token of {self.new} behind a known prefix of {self.prefix}"
        return f"first token of {self.new}"

    @property
    def tokens(self) -> int:
        """Room that an engine needs; prompts of earlier rounds may stay."""
        return 2 * (self.prefix + self.new + _SPARE_TOKENS)

    @property
    def shares(self) -> float:
        """Its part of the budget."""
        return 2 + (self.new + self.prefix / 4) / 512


Point = Decode | FirstToken


@dataclass(frozen=True, slots=True)
class Stage:
    """Points for which one start of the engines does."""

    points: tuple[Point, ...]

    @property
    def tokens(self) -> int:
        """Room for the largest point."""
        return max(point.tokens for point in self.points)


@dataclass(frozen=True, slots=True)
class Heat:
    """Engines that are alive together, `ours` first, and what they are measured at."""

    field: Field
    peers: tuple[str, ...]
    stage: Stage

    @property
    def engines(self) -> tuple[str, ...]:
        """All of them."""
        return (self.field.ours, *self.peers)


@dataclass(frozen=True, slots=True)
class Unfit:
    """Points of a peer that cannot be measured on this machine, and why."""

    field: Field
    peer: str
    stage: Stage
    reason: str


def need_bytes(name: str, shape: Shape, num_tokens: int) -> int:
    """About the memory that an engine takes with K/V of so many tokens."""
    engine = ENGINES[name]
    kv_bytes = shape.kv_bytes(num_tokens) * engine.kv_bits / 16
    return int(engine.base_bytes + shape.weight_bytes() * engine.base_share + 1.05 * kv_bytes)


def heats_of(
    stages: Sequence[Stage], engines: Collection[str], shape: Shape, free_bytes: int
) -> list[Heat | Unfit]:
    """Stage by stage and field by field, the engines that fit into memory together; late fields last."""
    late = [field for field in FIELDS if field.is_late]
    early = [field for field in FIELDS if not field.is_late]
    return [
        heat
        for fields in (early, late)
        for heat in _heats_of(stages, fields, engines, shape, free_bytes)
    ]


def _heats_of(
    stages: Sequence[Stage],
    fields: Sequence[Field],
    engines: Collection[str],
    shape: Shape,
    free_bytes: int,
) -> list[Heat | Unfit]:
    found: list[Heat | Unfit] = []
    for stage in stages:

        def need(name: str, num_tokens: int = stage.tokens) -> int:
            return need_bytes(name, shape, num_tokens)

        for field in fields:
            peers = [name for name in field.peers if name in engines]
            if field.ours in engines and peers:
                found += _packed(field, peers, stage, free_bytes, need)
    return found


def _packed(
    field: Field, peers: Sequence[str], stage: Stage, free_bytes: int, need: Callable[[str], int]
) -> list[Heat | Unfit]:
    """As many peers together as memory allows, `ours` with each lot."""
    found: list[Heat | Unfit] = []
    lot: list[str] = []
    for name in peers:
        alone = need(field.ours) + need(name)
        if alone > free_bytes:
            reason = f"both engines need {alone / 2**30:.0f} GiB, {free_bytes / 2**30:.0f} are free"
            found.append(Unfit(field, name, stage, reason))
        elif lot and sum(map(need, [field.ours, *lot, name])) > free_bytes:
            found.append(Heat(field, tuple(lot), stage))
            lot = [name]
        else:
            lot.append(name)
    if lot:
        found.append(Heat(field, tuple(lot), stage))
    return found
