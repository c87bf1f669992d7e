"""Blocks in a Redis or Valkey server, or a cluster of them, shared by all machines that reach it.

One key for each object: a prefix and the StoredKey in hexadecimal digits. Digits, since a prefix then says to
access rules (`~kvkeep:*`), to SCAN and to people what the keys are, and no byte of a digest can mean a
pattern or a cluster's hash tag; they cost 33 bytes beside a block of many thousand.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
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
from kvkeep.tiers.resp_transport import RespTransport, SetRequest
from kvkeep.tiers.resp_url import RespUrl, parse_resp_url
from kvkeep.tiers.views import byte_views

__all__ = ["MAX_VALUE_BYTES", "RespTier"]

_LOGGER = logging.getLogger(__name__)
# What servers take at most, unless they are set up otherwise.
MAX_VALUE_BYTES = 512 << 20


class RespTier(Tier):
    """A tier on a RESP server; `url` as in kvkeep.tiers.resp_url.

    Objects expire `ttl_s` after they were written or last touched, where that is given; beyond that the
    server bounds and evicts. A call takes at most `timeout_s`, waiting for one of `num_connections` to a
    server included. Servers that fail are left alone for a while: then all is absent that they have.

    A put whose answer is late has FAILED and may still arrive: the content is the same. What a server that
    does not answer should delete, it keeps, which is logged.

    Raises ConfigError for settings that cannot be, and where the server refuses the login. A server that does
    not answer is no error: the tier is used as soon as it does. `transport` replaces our own client.
    """

    capabilities = Capabilities(
        is_local=False, is_persistent=True, is_shared=True, keeps_labels=False
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
        return [self._presence(key, is_there) for key, is_there in zip(keys, there, strict=True)]

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        views = byte_views(buffers)
        num_bytes = sum(map(len, views))
        if not self._is_open:
            return self._books.miss(key, Miss(MissCause.UNAVAILABLE, "closed"))
        deadline = Deadline(self._timeout_s)
        self._books.deadline_to_reading[deadline] = num_bytes
        try:
            found = self._transport.get_into(self._name_of(key), views, num_bytes, deadline)
        finally:
            del self._books.deadline_to_reading[deadline]
        return self._books.miss(key, found) if isinstance(found, Miss) else found

    def put(self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int) -> PutOutcome:
        if num_bytes > self.max_object_bytes:
            return self._books.count_put(PutOutcome.REFUSED)
        if not self._is_open:
            return self._books.count_put(PutOutcome.FAILED)
        # What was there lately is sent again only if it is gone.
        if self._books.has_seen(key) and self.find([key])[0] is not Presence.ABSENT:
            return self._books.count_put(PutOutcome.PRESENT)
        if not self._books.begin_write(key, num_bytes):
            return self._books.count_put(PutOutcome.PRESENT)
        outcome = PutOutcome.FAILED
        try:
            request = SetRequest(self._name_of(key), parts, num_bytes, self._ttl_ms)
            result = self._transport.set(request, Deadline(self._timeout_s))
            outcome = result.outcome
            if result.reason:
                self._complain(result.reason)
        finally:
            was_deleted = self._books.end_write(key, num_bytes, outcome)
        if was_deleted:
            self._delete([key])
        return outcome

    def delete(self, keys: Sequence[StoredKey]) -> int:
        if not keys or not self._is_open:
            return 0
        writing = set(self._books.delete_writing(keys))
        if writing:
            # They count once, whether the server has one of before or not.
            self._delete(sorted(writing))
        return len(writing) + self._delete([key for key in keys if key not in writing])

    def objects(self) -> Iterator[StoredObject]:
        """All that the servers have under our prefix; those that do not answer are left out."""
        if not self._is_open:
            return
        seen: set[StoredKey] = set()
        try:
            for item in self._transport.scan(self._prefix, self._timeout_s):
                key = self._key_of(item.name)
                if key is not None and key not in seen and not self._books.is_writing(key):
                    seen.add(key)
                    yield StoredObject(key, item.num_bytes)
        except CallError as error:
            _LOGGER.warning("%s: not all objects could be listed: %s", self.name, error)

    def stats(self) -> TierStats:
        """Sizes are what this process has put and deleted; the rest is for the server to tell."""
        return self._books.stats()

    def touch(self, keys: Sequence[StoredKey]) -> None:
        if keys and self._is_open:
            self._transport.touch_many(
                [self._name_of(key) for key in keys], self._ttl_ms, Deadline(self._timeout_s)
            )

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

    def _presence(self, key: StoredKey, is_there: bool) -> Presence:  # noqa: FBT001 (a pair of a zip)
        if self._books.is_writing(key):
            return Presence.IN_FLIGHT
        return Presence.PRESENT if is_there else Presence.ABSENT

    def _delete(self, keys: Sequence[StoredKey]) -> int:
        if not keys:
            return 0
        deleted = self._transport.delete_many(
            [self._name_of(key) for key in keys], Deadline(self._timeout_s)
        )
        if deleted.num_failed:
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

    def _complain(self, reason: str) -> None:
        """Say once why a server that answers takes nothing; those that do not are their breaker's."""
        kind = reason.partition(" ")[0]
        # Errors of servers begin with such a word.
        if kind.isupper() and kind not in self._complaints:
            self._complaints.add(kind)
            _LOGGER.warning("%s (%s) takes no objects: %s", self.name, self.url, reason)


def _open_transport(
    url: RespUrl, *, num_connections: int, timeout_s: float, name: str
) -> RespTransport:
    if url.client == "glide":
        return open_glide(url, num_connections=num_connections, timeout_s=timeout_s, name=name)
    return open_sockets(url, num_connections=num_connections, name=name)


def _check_prefix(key_prefix: object) -> None:
    # No letter of a pattern of SCAN, and no brace of a hash tag.
    if not isinstance(key_prefix, str) or not re.fullmatch(r"[A-Za-z0-9:._/-]{0,200}", key_prefix):
        raise ConfigError(
            f"key_prefix={key_prefix!r} has letters that it cannot; use up to 200 of A-Z a-z 0-9 : . _ / -"
        )
