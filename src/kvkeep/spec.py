"""Shapes and ids: what a model's KV looks like, before any memory exists."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import NewType

from kvkeep.errors import ConfigError

__all__ = [
    "FORMAT_NAMES",
    "LONG_FORMAT_NAMES",
    "BlockId",
    "BlockKey",
    "GroupSpec",
    "KVFormat",
    "KVSpec",
    "LayerFormat",
    "LayerKind",
    "RequestId",
    "Span",
    "StoredKey",
    "check_format_name",
    "with_format",
    "words_can_hold",
]

# A place on the device, reused all the time. Never compare it with content.
BlockId = NewType("BlockId", int)
# The name of content, for ever: see docs/formats.md.
BlockKey = NewType("BlockKey", bytes)
# The name of one KV group's part of that content, as tiers keep it: the key and a byte of group number.
StoredKey = NewType("StoredKey", bytes)
RequestId = NewType("RequestId", int)


class LayerKind(StrEnum):
    """Which earlier positions a query at position p reads."""

    FULL = "full"  # all of them
    SLIDING = "sliding"  # the last `window` positions, p included
    CHUNKED = "chunked"  # those of its own chunk of `window` positions
    RECURRENT = "recurrent"  # none: a state is carried instead


class KVFormat(StrEnum):
    """How the elements of one token's keys, or values, of one head are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"  # e4m3fn times a scale
    INT8 = "int8"  # symmetric times a scale
    INT4 = "int4"  # rotated, minimum plus code times a scale

    @property
    def bits(self) -> int:
        """Bits of an element, metadata not counted."""
        return _FORMAT_TO_BITS[self]

    @property
    def is_quantised(self) -> bool:
        """Whether elements are codes that mean something with their vector's metadata only."""
        return self.bits <= 8

    @property
    def metadata_bytes(self) -> int:
        """Bytes beside the codes of one token and head."""
        return 4 if self.is_quantised else 0

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of `dim` elements, metadata included."""
        return dim * self.bits // 8 + self.metadata_bytes


_FORMAT_TO_BITS = {
    KVFormat.FLOAT32: 32,
    KVFormat.FLOAT16: 16,
    KVFormat.BFLOAT16: 16,
    KVFormat.FP8: 8,
    KVFormat.INT8: 8,
    KVFormat.INT4: 4,
}


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """The formats of one layer's keys and values."""

    k: KVFormat
    v: KVFormat

    def __str__(self) -> str:
        """What namespaces call it: of quantised formats with the version of their encoding."""
        name = _LAYER_FORMAT_TO_NAME.get(self, f"{self.k}+{self.v}")
        is_quantised = self.k.is_quantised or self.v.is_quantised
        return f"{name}/{_ENCODING_VERSION}" if is_quantised else name


# Grows when a vector gets other codes than before (docs/formats.md): such blocks must never meet.
_ENCODING_VERSION = 1
_NAME_TO_LAYER_FORMAT = {
    **{item.value: LayerFormat(item, item) for item in KVFormat},
    "k8v4": LayerFormat(KVFormat.INT8, KVFormat.INT4),
}
_LAYER_FORMAT_TO_NAME = {item: name for name, item in _NAME_TO_LAYER_FORMAT.items()}
_SHORT_TO_NAME = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What `kv_format` may be, without and with the short names of some.
LONG_FORMAT_NAMES = ("auto", *_NAME_TO_LAYER_FORMAT)
FORMAT_NAMES = (*LONG_FORMAT_NAMES, *_SHORT_TO_NAME)
# Keys, values and metadata are matrices of 32-bit words: 8 elements of 4 bits.
_ELEMENTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions `start <= p < stop` of one request."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """Layers that share shape and lifetime rule; each group has an arena of its own.

    `k_heads * k_dim` and `v_heads * v_dim` are the elements a token stores per layer. MLA models store a
    latent as "keys" and the rotated part as "values", which `is_latent` says: then the two widths differ, and
    the rotated part is never quantised. A recurrent group has one state per block in place of tokens:
    `state_bytes`, and no widths.

    `formats` has one entry a layer; without any, K/V are stored as the model computes them, `itemsize` bytes
    an element.
    """

    name: str
    kind: LayerKind
    layers: tuple[int, ...]
    window: int | None = None
    k_heads: int = 0
    k_dim: int = 0
    v_heads: int = 0
    v_dim: int = 0
    is_latent: bool = False
    itemsize: int = 0
    state_bytes: int = 0
    formats: tuple[LayerFormat, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.formats) in (0, len(self.layers))

    @property
    def k_width(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.k_heads * self.k_dim

    @property
    def v_width(self) -> int:
        """Elements of one token's values in one layer."""
        return self.v_heads * self.v_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token takes in all layers of the group."""
        if not self.formats:
            return len(self.layers) * (self.k_width + self.v_width) * self.itemsize
        return sum(
            self.k_heads * layer.k.vector_bytes(self.k_dim)
            + self.v_heads * layer.v.vector_bytes(self.v_dim)
            for layer in self.formats
        )

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: `block_size` tokens, or one recurrent state."""
        if self.kind is LayerKind.RECURRENT:
            return self.state_bytes
        return block_size * self.bytes_per_token

    def of_first_blocks(self) -> "GroupSpec":
        """What the group's first blocks are like where these lie apart, in the model's dtype."""
        return replace(self, name=f"{self.name} first", formats=())

    def first_needed(self, position: int) -> int:
        """The earliest position that a query at `position` reads."""
        match self.kind:
            case LayerKind.FULL:
                return 0
            case LayerKind.SLIDING:
                assert self.window is not None
                return max(0, position - self.window + 1)
            case LayerKind.CHUNKED:
                assert self.window is not None
                return position - position % self.window
            case LayerKind.RECURRENT:
                return position


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSpec:
    """Everything about a model's KV that the cache must know.

    With `exact_first_block` the first block of a sequence is stored in the model's dtype, in the groups that
    read all positions and have formats; the others are not changed by it.
    """

    groups: tuple[GroupSpec, ...]
    block_size: int
    dtype: str
    exact_first_block: bool = False

    @property
    def first_block_groups(self) -> tuple[int, ...]:
        """The groups whose first blocks lie apart."""
        return tuple(
            at
            for at, group in enumerate(self.groups)
            if self.exact_first_block and group.kind is LayerKind.FULL and group.formats
        )

    @property
    def block_classes(self) -> tuple[GroupSpec, ...]:
        """What blocks are like: those of each group, then the first blocks of `first_block_groups`."""
        firsts = (self.groups[at].of_first_blocks() for at in self.first_block_groups)
        return (*self.groups, *firsts)

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token takes in all groups (recurrent states not counted)."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry a state that only a whole run of tokens can rebuild."""
        return any(group.kind is LayerKind.RECURRENT for group in self.groups)

    @property
    def kv_format(self) -> str:
        """How K/V are stored, as canonical text for a namespace: docs/formats.md.

        The format of most layers; then, for each other one, the layers that have it: "int4/1;0,1=bfloat16";
        then that of first blocks, if they lie apart: "int4/1;first=bfloat16".
        """
        layer_to_name = {
            layer: str(group.formats[at]) if group.formats else self.dtype
            for group in self.groups
            if group.kind is not LayerKind.RECURRENT
            for at, layer in enumerate(group.layers)
        }
        counts = Counter(layer_to_name.values())
        # A tie is decided by name, the last first, which puts what is quantised before floats.
        order = sorted(counts, key=lambda name: (counts[name], name), reverse=True)
        first, *others = order or [self.dtype]
        parts = [first]
        for name in others:
            layers = sorted(at for at, own in layer_to_name.items() if own == name)
            parts.append(f"{','.join(map(str, layers))}={name}")
        if self.first_block_groups:
            parts.append(f"first={self.dtype}")
        return ";".join(parts)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy, the open tail included."""
        return -(-num_tokens // self.block_size)

    def block_bytes(self) -> int:
        """Bytes of one block in every group."""
        return sum(group.block_bytes(self.block_size) for group in self.groups)


def check_format_name(name: str) -> None:
    """Raise ConfigError, with the nearest name, unless `name` is one of FORMAT_NAMES."""
    if name not in FORMAT_NAMES:
        near = get_close_matches(str(name), FORMAT_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(FORMAT_NAMES)}"
        raise ConfigError(f"kv_format={name!r} is unknown; {hint}")


def with_format(spec: KVSpec, name: str, *, exact_layers: Collection[int] = ()) -> KVSpec:
    """`spec` with K/V stored as `name` says, one of FORMAT_NAMES; "auto" is as the model computes them.

    So do the model's layers of `exact_layers` stay, and groups whose keys and values differ in heads, where
    others can have the format; recurrent groups have none. Of MLA groups a quantised format is that of the
    latent, the rotated part stays as computed. Raises ConfigError for an unknown name, for a layer that keeps
    no K/V, and for shapes that the format cannot hold.
    """
    check_format_name(name)
    _check_exact_layers(spec, exact_layers)
    plain = replace(spec, groups=tuple(replace(group, formats=()) for group in spec.groups))
    full_name = _SHORT_TO_NAME.get(name, name)
    if full_name in ("auto", spec.dtype):
        return plain
    if not any(_may_have_format(group) for group in plain.groups):
        raise ConfigError(
            f"kv_format={name!r} needs layers with as many key heads as value heads, and this model has "
            "none; use kv_format='auto'"
        )
    wanted, as_computed = _NAME_TO_LAYER_FORMAT[full_name], _as_computed(spec)
    groups = []
    for group in plain.groups:
        own = _format_of(group, wanted, as_computed)
        formats = tuple(as_computed if at in exact_layers else own for at in group.layers)
        if _may_have_format(group) and set(formats) != {as_computed}:
            _check_shape(name, group, spec.block_size)
            groups.append(replace(group, formats=formats))
        else:
            groups.append(group)
    found = replace(plain, groups=tuple(groups))
    _check_first_block(name, found)
    return found


def words_can_hold(group: GroupSpec, block_size: int) -> bool:
    """Whether the words layout, which every format but the model's own needs, can hold the group."""
    return _may_have_format(group) and not _odd_sizes(group, block_size)


def _as_computed(spec: KVSpec) -> LayerFormat:
    if spec.dtype not in _NAME_TO_LAYER_FORMAT:
        raise ConfigError(
            f"dtype={spec.dtype!r} has no KV format; load the model in float32, bfloat16 or float16"
        )
    return _NAME_TO_LAYER_FORMAT[spec.dtype]


def _format_of(group: GroupSpec, wanted: LayerFormat, as_computed: LayerFormat) -> LayerFormat:
    if group.is_latent and wanted.v.is_quantised:
        # A ninth of the bytes in DeepSeek's models, and every head reads its error.
        return LayerFormat(wanted.k, as_computed.v)
    return wanted


def _may_have_format(group: GroupSpec) -> bool:
    return group.kind is not LayerKind.RECURRENT and group.k_heads == group.v_heads


def _odd_sizes(group: GroupSpec, block_size: int) -> list[str]:
    sizes = {"block_size": block_size, "k_dim": group.k_dim, "v_dim": group.v_dim}
    return [f"{field}={size}" for field, size in sizes.items() if size % _ELEMENTS_AT_ONCE]


def _check_shape(name: str, group: GroupSpec, block_size: int) -> None:
    odd = _odd_sizes(group, block_size)
    if odd:
        remedy = "kv_format='auto'"
        if block_size % _ELEMENTS_AT_ONCE:
            remedy = (
                f"block_size={-(-block_size // _ELEMENTS_AT_ONCE) * _ELEMENTS_AT_ONCE} or {remedy}"
            )
        raise ConfigError(
            f"kv_format={name!r} needs multiples of {_ELEMENTS_AT_ONCE}, and {', '.join(odd)} is none in the "
            f"KV group {group.name}; use {remedy}"
        )


def _check_first_block(name: str, spec: KVSpec) -> None:
    has_formats = any(group.formats for group in spec.groups)
    if spec.exact_first_block and has_formats and not spec.first_block_groups:
        raise ConfigError(
            f"kv_exact_first_block=True with kv_format={name!r} needs layers that read all positions, and "
            "this model's all have windows; use kv_exact_first_block=False"
        )


def _check_exact_layers(spec: KVSpec, exact_layers: Collection[int]) -> None:
    layers = {
        at for group in spec.groups if group.kind is not LayerKind.RECURRENT for at in group.layers
    }
    unknown = sorted(set(exact_layers) - layers)
    if unknown:
        raise ConfigError(
            f"exact_layers={unknown} keep no K/V of their own; choose from {sorted(layers)}"
        )


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sorted spans with touching neighbours joined."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].stop == span.start:
            merged[-1] = Span(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)
