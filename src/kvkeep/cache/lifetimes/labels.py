"""What a block bears beside its content: who uses it, what it depends on, how long it is kept.

The same for all KV groups of a block, on the device and in every tier. Stored form: docs/formats.md.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import NamedTuple, NewType

import msgspec

from kvkeep.spec import BlockKey

__all__ = [
    "ANY_TAG",
    "DEFAULT_PRIORITY",
    "ContextId",
    "Labels",
    "PinId",
    "SessionId",
    "decode_labels",
    "encode_labels",
    "merge_labels",
]

PinId = NewType("PinId", str)

DEFAULT_PRIORITY = 50
# Of a block on which so many tags piled up that some were left out: every tag means it. No request can give
# it, since names have no control characters.
ANY_TAG = "\0any"
_VERSION = 1
_KEY_BYTES = 32
# A block of more sessions than these counts as everybody's: no one of them takes it along when it ends.
_MAX_SESSIONS = 64
_MAX_CONTEXTS = 16
_MAX_TAGS = 1024


class SessionId(NamedTuple):
    """A session of one namespace: tenants may use the same names."""

    namespace: BlockKey
    name: str


class ContextId(NamedTuple):
    """What a session was about when it used a block."""

    session: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Labels of one block; never changed, since 100,000 blocks share a few.

    `sessions` are those that use it, `is_shared` says that a request without session does. Times are seconds
    of the wall clock; `expires_at` is infinite where nothing ends the block's life. `contexts` are those in
    which its sessions used it.
    """

    namespace: BlockKey
    sessions: frozenset[str] = frozenset()
    is_shared: bool = False
    tags: frozenset[str] = frozenset()
    expires_at: float = inf
    created_at: float = 0.0
    priority: int = DEFAULT_PRIORITY
    pins: frozenset[PinId] = frozenset()
    contexts: frozenset[ContextId] = frozenset()

    @property
    def ends_at(self) -> float:
        """When the block is not served any more: never while it is pinned."""
        return inf if self.pins else self.expires_at

    @property
    def is_orphaned(self) -> bool:
        """Whether nobody uses the block, nor has pinned it: its session has ended."""
        return not self.sessions and not self.is_shared and not self.pins

    def bears(self, tags: AbstractSet[str]) -> bool:
        """Whether one of these tags means the block."""
        return ANY_TAG in self.tags or not self.tags.isdisjoint(tags)

    def joined(self, tags: frozenset[str]) -> frozenset[str]:
        """Its tags and these; beyond a thousand these alone, and that it may have any."""
        joined = self.tags | tags
        return joined if len(joined) <= _MAX_TAGS else tags | {ANY_TAG}

    def is_owned_by(self, session: str) -> bool:
        """Whether the block goes with the session: nobody else uses it, and nobody has pinned it."""
        return self.sessions == {session} and not self.is_shared and not self.pins

    def kept(
        self, is_session: Callable[[SessionId], bool], is_pin: Callable[[PinId], bool]
    ) -> "Labels":
        """The same without sessions and pins that there are no more."""
        gone = [one for one in self.sessions if not is_session(SessionId(self.namespace, one))]
        labels = self
        for session in gone:
            labels = labels.without_session(session)
        if labels.pins:
            labels = replace(labels, pins=frozenset(filter(is_pin, labels.pins)))
        return labels

    def without_session(self, session: str) -> "Labels":
        """The same once the session has ended."""
        return replace(
            self,
            sessions=self.sessions - {session},
            contexts=frozenset(one for one in self.contexts if one.session != session),
        )

    def without_pin(self, pin: PinId) -> "Labels":
        """The same once nobody means it by this pin."""
        return replace(self, pins=self.pins - {pin})

    def bounded(self) -> "Labels":
        """The same with sets of a bounded size: what many use is shared."""
        if len(self.sessions) <= _MAX_SESSIONS and len(self.contexts) <= _MAX_CONTEXTS:
            return self
        labels = self
        if len(self.sessions) > _MAX_SESSIONS:
            labels = replace(labels, sessions=frozenset(), is_shared=True, contexts=frozenset())
        return replace(labels, contexts=frozenset(sorted(labels.contexts)[:_MAX_CONTEXTS]))


def merge_labels(left: Labels, right: Labels) -> Labels:
    """What a block bears that two machines have labelled: all users, the longest life."""
    return Labels(
        namespace=left.namespace,
        sessions=left.sessions | right.sessions,
        is_shared=left.is_shared or right.is_shared,
        tags=left.tags | right.tags,
        expires_at=max(left.expires_at, right.expires_at),
        created_at=min(left.created_at, right.created_at),
        priority=max(left.priority, right.priority),
        pins=left.pins | right.pins,
        contexts=left.contexts | right.contexts,
    ).bounded()


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """Labels as they are written. Fields are added at the end, under a new version."""

    version: int
    namespace: bytes
    sessions: list[str]
    is_shared: bool
    tags: list[str]
    expires_at: float
    created_at: float
    priority: int
    pins: list[str]
    contexts: list[tuple[str, str]]


_DECODER = msgspec.msgpack.Decoder(_Stored)


def encode_labels(labels: Labels) -> bytes:
    """Labels as bytes, equal for equal labels."""
    return msgspec.msgpack.encode(
        _Stored(
            _VERSION,
            labels.namespace,
            sorted(labels.sessions),
            labels.is_shared,
            sorted(labels.tags),
            labels.expires_at,
            labels.created_at,
            labels.priority,
            sorted(labels.pins),
            [(one.session, one.name) for one in sorted(labels.contexts)],
        )
    )


def decode_labels(encoded: bytes) -> Labels | None:
    """Labels from bytes; None for what no labels are, b"" included, or of a version not known here."""
    try:
        stored = _DECODER.decode(encoded)
    except msgspec.DecodeError:
        return None
    is_known = stored.version == _VERSION and len(stored.namespace) == _KEY_BYTES
    if not is_known or isnan(stored.expires_at) or isnan(stored.created_at):
        return None
    return Labels(
        namespace=BlockKey(stored.namespace),
        sessions=frozenset(stored.sessions),
        is_shared=stored.is_shared,
        tags=frozenset(stored.tags),
        expires_at=stored.expires_at,
        created_at=stored.created_at,
        priority=stored.priority,
        pins=frozenset(map(PinId, stored.pins)),
        contexts=frozenset(ContextId(*one) for one in stored.contexts),
    )
