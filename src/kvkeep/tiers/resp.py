"""Blocks in a Redis or Valkey server, or a cluster of them, shared by all machines that reach it.

One key for each object: a prefix and the StoredKey in hexadecimal digits. Digits, since a prefix then says to
access rules (`~kvkeep:*`), to SCAN and to people what the keys are, and no byte of a digest can mean a
pattern or a cluster's hash tag; they cost 33 bytes beside a block of many thousand. Its value is the object
with its labels behind it, see `stored_value`: a server that evicts takes both.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
    LabelChange,
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.breaker import BreakerStats
from kvkeep.tiers.deadlines import CallError, Deadline, SettingError
from kvkeep.tiers.remote_books import RemoteBooks
from kvkeep.tiers.remote_checks import check_count, check_seconds
from kvkeep.tiers.resp_glide import open_glide
from kvkeep.tiers.resp_sockets import open_sockets
from kvkeep.tiers.resp_transport import Patch, RespTransport, SetRequest
from kvkeep.tiers.resp_url import RespUrl, parse_resp_url
from kvkeep.tiers.stored_value import (
    MAX_LABEL_BYTES,
    ROOM_BYTES,
    End,
    Listed,
    labelled_values,
    read_labels,
    roomy_tail,
)
from kvkeep.tiers.trailer import TRAILER_BYTES
from kvkeep.tiers.views import byte_views

__all__ = ["MAX_VALUE_BYTES", "RespTier"]

_LOGGER = logging.getLogger(__name__)
# What servers take at most, unless they are set up otherwise.
MAX_VALUE_BYTES = 512 << 20
# Labels that are replaced under one deadline; and how often, when others do so too.
_MAX_RELABELLED, _MAX_TRIES = 1000, 5


class RespTier(Tier):
    """A tier on a RESP server; `url` as in kvkeep.tiers.resp_url.

    Objects expire `ttl_s` after they were written or last touched, where that is given; beyond that the
    server bounds and evicts. A call takes at most `timeout_s`, waiting for one of `num_connections` to a
    server included. Servers that fail are left alone for a while: then all is absent that they have.

    A user of the server needs the commands get, set, strlen, getrange, unlink, exists, touch, pexpire, scan,
    ping and hello, and for labels to be replaced eval and setrange.

    A put whose answer is late has FAILED and may still arrive: the content is the same. What a server that
    does not answer should delete, it keeps, which is logged.

    Raises ConfigError for settings that cannot be, and where the server refuses the login. A server that does
    not answer is no error: the tier is used as soon as it does. `transport` replaces our own client.
    """

    capabilities = Capabilities(
        is_local=False, is_persistent=True, is_shared=True, keeps_labels=True
    )

    def __init__(
        self,
        url: str,
        *,
        key_prefix: str = "kvkeep:",
        ttl_s: float | None = None,
        timeout_s: float = 1.0,
        num_connections: int = 4,
        max_object_bytes: int = MAX_VALUE_BYTES,
        transport: RespTransport | None = None,
        name: str = "remote",
    ) -> None:
        parsed = parse_resp_url(url)
        _check_prefix(key_prefix)
        check_seconds("timeout_s", timeout_s)
        if ttl_s is not None:
            check_seconds("ttl_s", ttl_s)
        check_count("num_connections", num_connections, 1024)
        check_count("max_object_bytes", max_object_bytes, MAX_VALUE_BYTES)
        self.name = name
        self.url = str(parsed)
        self.max_object_bytes = max_object_bytes
        self._prefix = key_prefix.encode()
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._timeout_s = timeout_s
        self._books = RemoteBooks(name)
        self._complaints: set[str] = set()
        self._is_open = True
        self._transport = transport or _open_transport(
            parsed, num_connections=num_connections, timeout_s=timeout_s, name=name
        )
        self._greet()

    @property
    def capacity_bytes(self) -> int | None:
        """None: the server is bounded by its own settings."""
        return None

    @property
    def used_bytes(self) -> int:
        """What this process has put there and not deleted; others put more, and the server evicts."""
        return self._books.used_bytes

    @property
    def breakers(self) -> list[BreakerStats]:
        """Which servers are used, and which are left alone."""
        return [breaker.stats() for breaker in self._transport.breakers]

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        if not keys or not self._is_open:
            return [Presence.ABSENT] * len(keys)
        there = self._transport.exists_many(
            [self._name_of(key) for key in keys], Deadline(self._timeout_s)
        )
        self._books.see(key for key, is_there in zip(keys, there, strict=True) if is_there)
        return [
            self._books.presence(key, is_there=is_there)
            for key, is_there in zip(keys, there, strict=True)
        ]

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        views = byte_views(buffers)
        num_bytes = sum(map(len, views))
        if not self._is_open:
            return self._books.miss(key, Miss(MissCause.UNAVAILABLE, "closed"))
        deadline = Deadline(self._timeout_s)
        self._books.deadline_to_reading[deadline] = num_bytes + ROOM_BYTES
        try:
            found = self._transport.get_into(self._name_of(key), views, num_bytes, deadline)
        finally:
            del self._books.deadline_to_reading[deadline]
        return self._books.miss(key, found) if isinstance(found, Miss) else found

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        if num_bytes > self.max_object_bytes or len(labels) > MAX_LABEL_BYTES:
            return self._books.count_put(PutOutcome.REFUSED)
        if num_bytes + len(labels) + ROOM_BYTES > MAX_VALUE_BYTES:
            return self._books.count_put(PutOutcome.REFUSED)
        if not self._is_open:
            return self._books.count_put(PutOutcome.FAILED)
        # What was there lately is sent again only if it is gone.
        if self._books.has_seen(key) and self.find([key])[0] is not Presence.ABSENT:
            return self._books.count_put(PutOutcome.PRESENT)
        tail = roomy_tail(num_bytes, labels)
        value_bytes = num_bytes + len(tail)
        if not self._books.begin_write(key, value_bytes):
            return self._books.count_put(PutOutcome.PRESENT)
        outcome = PutOutcome.FAILED
        try:
            request = SetRequest(self._name_of(key), parts, num_bytes, self._ttl_ms, tail)
            result = self._transport.set(request, Deadline(self._timeout_s))
            outcome = result.outcome
            if result.reason:
                self._complain(result.reason, "objects")
        finally:
            was_deleted = self._books.end_write(key, value_bytes, outcome)
        if was_deleted:
            self._delete([key])
        return outcome

    def delete(self, keys: Sequence[StoredKey]) -> int:
        if not keys or not self._is_open:
            return 0
        return self._books.delete(keys, self._delete)

    @property
    def num_unreached(self) -> int:
        return self._books.num_unreached

    def objects(self) -> Iterator[StoredObject]:
        """All that the servers have under our prefix; those that do not answer are left out."""
        for listed in self._listed(TRAILER_BYTES):
            yield StoredObject(listed.key, listed.form.num_bytes)

    def stats(self) -> TierStats:
        """Sizes are what this process has put and deleted; the rest is for the server to tell."""
        return self._books.stats()

    def touch(self, keys: Sequence[StoredKey]) -> None:
        if keys and self._is_open:
            self._transport.touch_many(
                [self._name_of(key) for key in keys], self._ttl_ms, Deadline(self._timeout_s)
            )

    def labels(self, key: StoredKey) -> bytes | None:
        def read(num_bytes: int) -> End | None:
            name, deadline = self._name_of(key), Deadline(self._timeout_s)
            (end,) = self._transport.ends([name], num_bytes, deadline)
            return end if end is not None and end.length else None

        return read_labels(read) if self._is_open else None

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        """What another machine writes at the same time may be lost."""
        return self._revise_all([key], lambda _key, _old: labels, compares=False)[0]

    def revise_labels(self, keys: Sequence[StoredKey], change: LabelChange) -> list[bool]:
        """What another machine writes at the same time is not lost; it is not done where that goes on."""
        return self._revise_all(keys, change, compares=True)

    def _revise_all(
        self, keys: Sequence[StoredKey], change: LabelChange, *, compares: bool
    ) -> list[bool]:
        if not self._is_open:
            return [False] * len(keys)
        done: set[StoredKey] = set()
        for first in range(0, len(keys), _MAX_RELABELLED):
            left = list(keys[first : first + _MAX_RELABELLED])
            deadline = Deadline(self._timeout_s)
            for _ in range(_MAX_TRIES):
                if left:
                    left = self._revise(left, change, done, deadline, compares=compares)
        return [key in done for key in keys]

    def labelled(self) -> Iterator[Labelled]:
        return labelled_values(self._listed(ROOM_BYTES), self.labels)

    def close(self) -> None:
        self._is_open = False
        self._transport.close()

    def _greet(self) -> None:
        try:
            self._transport.ping(Deadline(self._timeout_s))
        except SettingError as error:
            self.close()
            raise ConfigError(f"url={self.url!r}: {error}") from error
        except CallError:
            # Its breaker has said so; the tier is used once the server answers.
            pass

    def _listed(self, end_bytes: int) -> Iterator[Listed]:
        """All values of ours, of whose ends so many bytes are read."""
        if not self._is_open:
            return
        seen: set[StoredKey] = set()
        try:
            for item in self._transport.scan(self._prefix, self._timeout_s, end_bytes=end_bytes):
                key = self._key_of(item.name)
                if key is not None and key not in seen and not self._books.is_writing(key):
                    seen.add(key)
                    yield Listed(key, item.end.form())
        except CallError as error:
            self._books.count_unreached()
            _LOGGER.warning("%s: not all objects could be listed: %s", self.name, error)

    def _revise(
        self,
        keys: Sequence[StoredKey],
        change: LabelChange,
        done: set[StoredKey],
        deadline: Deadline,
        *,
        compares: bool,
    ) -> list[StoredKey]:
        """Try once; adds what was done, and returns what has changed meanwhile, to be tried again."""
        names = [self._name_of(key) for key in keys]
        key_to_patch: dict[StoredKey, Patch] = {}
        ends = self._transport.ends(names, ROOM_BYTES, deadline)
        for key, name, end in zip(keys, names, ends, strict=True):
            if end is None or not end.length:
                continue
            labels = end.form().labels
            if labels is None:
                # Longer than what was read; where they are damaged no get gives them.
                labels = self.labels(key) or b""
            new = change(key, labels)
            if new is None:
                done.add(key)
            elif len(new) <= MAX_LABEL_BYTES:
                key_to_patch[key] = _patch(name, end, new, compares=compares)
        patches = list(key_to_patch.values())
        results = self._transport.patch_many(patches, deadline) if patches else []
        for result in results:
            if result.outcome is PutOutcome.FAILED:
                self._complain(result.reason, "labels")
        outcomes = dict(zip(key_to_patch, results, strict=True))
        done.update(key for key, one in outcomes.items() if one.outcome is PutOutcome.STORED)
        return [key for key, one in outcomes.items() if one.outcome is PutOutcome.REFUSED]

    def _delete(self, keys: Sequence[StoredKey]) -> int:
        if not keys:
            return 0
        deleted = self._transport.delete_many(
            [self._name_of(key) for key in keys], Deadline(self._timeout_s)
        )
        if deleted.num_failed:
            self._books.count_unreached()
            _LOGGER.warning(
                "%s (%s): %d keys were not deleted, since their server does not answer",
                self.name, self.url, deleted.num_failed,
            )  # fmt: skip
        self._books.count_deleted(deleted.num_objects, deleted.num_bytes)
        return deleted.num_objects

    def _name_of(self, key: StoredKey) -> bytes:
        return self._prefix + key.hex().encode()

    def _key_of(self, name: bytes) -> StoredKey | None:
        """The key of a name, None for names that are none of ours."""
        digits = name.removeprefix(self._prefix)
        try:
            key = StoredKey(bytes.fromhex(digits.decode()))
        except ValueError:
            return None
        return key if self._name_of(key) == name else None

    def _complain(self, reason: str, what: str) -> None:
        """Say once why a server that answers takes nothing; those that do not are their breaker's."""
        kind = reason.partition(" ")[0]
        # Errors of servers begin with such a word.
        if kind.isupper() and f"{kind} {what}" not in self._complaints:
            self._complaints.add(f"{kind} {what}")
            _LOGGER.warning("%s (%s) takes no %s: %s", self.name, self.url, what, reason)


def _open_transport(
    url: RespUrl, *, num_connections: int, timeout_s: float, name: str
) -> RespTransport:
    if url.client == "glide":
        return open_glide(url, num_connections=num_connections, timeout_s=timeout_s, name=name)
    return open_sockets(url, num_connections=num_connections, name=name)


def _patch(name: bytes, end: End, labels: bytes, *, compares: bool) -> Patch:
    """Other labels for a value that ends so; where it `compares` not written if somebody was first."""
    num_bytes = end.form().num_bytes
    tail_bytes = end.length - num_bytes
    tail = roomy_tail(num_bytes, labels, least_bytes=tail_bytes)
    trailer = bytes(end.end[-TRAILER_BYTES:]) if tail_bytes and compares else b""
    return Patch(name, end.length, num_bytes, tail, trailer)


def _check_prefix(key_prefix: object) -> None:
    # No letter of a pattern of SCAN, and no brace of a hash tag.
    if not isinstance(key_prefix, str) or not re.fullmatch(r"[A-Za-z0-9:._/-]{0,200}", key_prefix):
        raise ConfigError(
            f"key_prefix={key_prefix!r} has letters that it cannot; use up to 200 of A-Z a-z 0-9 : . _ / -"
        )
