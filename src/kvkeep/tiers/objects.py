"""Blocks in an S3-compatible object store, through obstore: cold, large, and reached by all machines.

One object for each block, `prefix/` and the StoredKey in hexadecimal digits; labels, where there are any, are
behind it, see `stored_value`. An upload or download passes through memory of its own, so that a call that is
given up cannot touch the caller's any more.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import TypeVar

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.breaker import Breaker, BreakerStats
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, SettingError
from kvkeep.tiers.object_store import BucketAddress, open_bucket
from kvkeep.tiers.remote_books import RemoteBooks
from kvkeep.tiers.remote_checks import check_count, check_seconds
from kvkeep.tiers.stored_value import (
    MAX_LABEL_BYTES,
    ROOM_BYTES,
    End,
    Listed,
    judge,
    labelled_values,
    read_labels,
)
from kvkeep.tiers.trailer import TRAILER_BYTES, encode_tail
from kvkeep.tiers.views import byte_views, scatter

__all__ = ["ObjectTier"]

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")
# From so many keys on a listing is tried before single questions, and not again for a while if it is long.
_LISTING_FROM_KEYS = 32
_LISTING_PAUSE_S = 60.0
# Ends of objects that are read under one deadline.
_ENDS_PER_CONNECTION = 32


class ObjectTier(Tier):
    """A tier in a bucket: "s3://bucket/prefix", with "?max_object_bytes=64MiB" if 512 MiB are too many.

    Without `access_key` and `secret_key` the account is found where AWS's own tools look for it; it must be
    allowed to list the bucket, since otherwise what is absent looks like what is forbidden. `endpoint` is the
    address of a store that is not AWS. A call takes at most `timeout_s`, with its retries and with waiting
    for one of `num_connections`; a store that fails is left alone for a while.

    A put that is given up has FAILED and may still arrive: the content is the same. Labels cannot be
    replaced, since that would be another upload, which could bring back what somebody deletes meanwhile.

    Raises ConfigError for settings that cannot be, where obstore is not installed, and where the store
    refuses the account or has no such bucket. One that does not answer is no error: it is used once it does.
    """

    capabilities = Capabilities(
        is_local=False, is_persistent=True, is_shared=True, keeps_labels=True, relabels=False
    )

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        timeout_s: float = 10.0,
        num_connections: int = 8,
        name: str = "remote",
    ) -> None:
        check_seconds("timeout_s", timeout_s)
        check_count("num_connections", num_connections, 1024)
        address = BucketAddress(
            url=url,
            endpoint=endpoint,
            region=region,
            access_key=access_key,
            secret_key=secret_key,
        )
        self._bucket = open_bucket(address, timeout_s)
        self.name = name
        self.url = self._bucket.shown
        self.max_object_bytes = self._bucket.max_object_bytes
        self._timeout_s = timeout_s
        self._num_connections = num_connections
        self._breaker = Breaker(f"{name} ({self.url})")
        self._calls = BoundedCalls(num_connections, name=name)
        self._books = RemoteBooks(name)
        self._lists_from_s = monotonic()
        self._is_open = True
        self._greet()

    @property
    def capacity_bytes(self) -> int | None:
        """None: whoever pays for the bucket bounds it."""
        return None

    @property
    def used_bytes(self) -> int:
        """What this process has put there and not deleted; others put more."""
        return self._books.used_bytes

    @property
    def breakers(self) -> list[BreakerStats]:
        """Whether the store is used, or left alone."""
        return [self._breaker.stats()]

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        """One listing answers for many keys while the bucket is small; else each is asked for."""
        if not keys or not self._is_open:
            return [Presence.ABSENT] * len(keys)
        there = self._there(keys, Deadline(self._timeout_s))
        self._books.see(there)
        return [self._books.presence(key, is_there=key in there) for key in keys]

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        views = byte_views(buffers)
        num_bytes = sum(map(len, views))
        if not self._is_open:
            return self._books.miss(key, Miss(MissCause.UNAVAILABLE, "closed"))
        deadline = Deadline(self._timeout_s)
        self._books.deadline_to_reading[deadline] = num_bytes
        try:
            try:
                content = self._call(partial(self._bucket.download, key, num_bytes), deadline)
            except CallError as error:
                content = Miss(error.cause, str(error))
            if isinstance(content, Miss):
                return self._books.miss(key, content)
            scatter(content[:num_bytes], views)
            found = judge(views, content[num_bytes:], num_bytes)
        finally:
            del self._books.deadline_to_reading[deadline]
        return self._books.miss(key, found) if isinstance(found, Miss) else found

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        if num_bytes > self.max_object_bytes or len(labels) > MAX_LABEL_BYTES:
            return self._books.count_put(PutOutcome.REFUSED)
        if not self._is_open or self._breaker.is_resting:
            return self._books.count_put(PutOutcome.FAILED)
        tail = encode_tail(num_bytes, labels) if labels else b""
        value_bytes = num_bytes + len(tail)
        if not self._books.begin_write(key, value_bytes):
            return self._books.count_put(PutOutcome.PRESENT)
        outcome = PutOutcome.FAILED
        try:
            content = b"".join([*parts, tail])
            if len(content) == value_bytes:
                outcome = self._call(
                    partial(self._bucket.upload, key, content), Deadline(self._timeout_s)
                )
        except CallError as error:
            _LOGGER.debug("%s: a put failed: %s", self.name, error)
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
        """All objects under the prefix whose names are keys; ends early if the store stops answering.

        Besides the listing it takes a small request for each object, which says where its labels begin.
        """
        for listed in self._listed(TRAILER_BYTES):
            yield StoredObject(listed.key, listed.form.num_bytes)

    def labels(self, key: StoredKey) -> bytes | None:
        def read(num_bytes: int) -> End | None:
            length = self._bucket.size_of(key)
            end = None if length is None else self._bucket.end_of(key, length, num_bytes)
            return None if length is None or end is None else End(length, end)

        try:
            work = partial(read_labels, read)
            return self._call(work, Deadline(self._timeout_s)) if self._is_open else None
        except CallError:
            return None

    def labelled(self) -> Iterator[Labelled]:
        return labelled_values(self._listed(ROOM_BYTES), self.labels)

    def stats(self) -> TierStats:
        """Sizes are what this process has put and deleted."""
        return self._books.stats()

    def close(self) -> None:
        self._is_open = False
        self._calls.close()

    def _greet(self) -> None:
        try:
            self._call(self._bucket.check, Deadline(self._timeout_s))
        except SettingError as error:
            self.close()
            raise ConfigError(f"url={self.url!r}: {error}") from error
        except CallError as error:
            # Logged by the breaker; the tier is used once the store answers.
            self._breaker.trip(str(error))

    def _call(self, work: Callable[[], T], deadline: Deadline) -> T:
        """What `work` gives, on another thread; raises CallError."""
        permit = self._breaker.admit()
        if permit is None:
            raise CallError(
                MissCause.UNAVAILABLE, f"{self.url} is left alone: {self._breaker.reason}"
            )
        try:
            future = self._calls.start(work, deadline)
        except BaseException:
            # Waiting for each other says nothing about the store.
            permit.abandon()
            raise
        try:
            result = self._calls.finish(future, deadline)
        except CallError as error:
            permit.fail(str(error))
            raise
        except BaseException:
            permit.abandon()
            raise
        permit.succeed()
        return result

    def _listed(self, end_bytes: int) -> Iterator[Listed]:
        """All objects under the prefix, of whose ends so many bytes are read, some at a time."""
        pages = self._bucket.pages()
        while self._is_open:
            faults: list[CallError] = []
            try:
                page = self._call(lambda: next(pages, None), Deadline(self._timeout_s))
            except CallError as error:
                page, faults = [], [error]
            num_at_once = _ENDS_PER_CONNECTION * self._num_connections
            for first in range(0, len(page or ()), num_at_once):
                yield from self._forms((page or [])[first : first + num_at_once], end_bytes, faults)
            if faults:
                self._books.count_unreached()
                _LOGGER.warning("%s: not all objects could be listed: %s", self.name, faults[0])
            if page is None or faults:
                return

    def _forms(
        self, items: Sequence[StoredObject], end_bytes: int, faults: list[CallError]
    ) -> list[Listed]:
        key_to_length = {
            item.key: item.num_bytes for item in items if not self._books.is_writing(item.key)
        }

        def end_of(key: StoredKey) -> bytes | None:
            return self._bucket.end_of(key, key_to_length[key], end_bytes)

        key_to_end = self._ask_all(
            list(key_to_length), end_of, Deadline(self._timeout_s), faults=faults
        )
        return [Listed(key, End(key_to_length[key], end).form()) for key, end in key_to_end.items()]

    def _there(self, keys: Sequence[StoredKey], deadline: Deadline) -> set[StoredKey]:
        if len(keys) >= _LISTING_FROM_KEYS and monotonic() >= self._lists_from_s:
            max_pages = max(1, len(keys) // (2 * self._num_connections))
            try:
                listed = self._call(partial(self._list_all, max_pages), deadline)
            except CallError:
                return set()
            if listed is not None:
                return listed.intersection(keys)
            self._lists_from_s = monotonic() + _LISTING_PAUSE_S
        return set(self._sizes_of(keys, deadline))

    def _list_all(self, max_pages: int) -> set[StoredKey] | None:
        """All keys there are, None where more pages would be needed."""
        pages, found = self._bucket.pages(), set[StoredKey]()
        for _ in range(max_pages):
            page = next(pages, None)
            if page is None:
                return found
            found.update(item.key for item in page)
        return None

    def _sizes_of(self, keys: Sequence[StoredKey], deadline: Deadline) -> dict[StoredKey, int]:
        """The lengths of those that are there, as far as the store answers in time."""
        return self._ask_all(keys, self._bucket.size_of, deadline, faults=[])

    def _ask_all(
        self,
        keys: Sequence[StoredKey],
        question: Callable[[StoredKey], T | None],
        deadline: Deadline,
        *,
        faults: list[CallError],
    ) -> dict[StoredKey, T]:
        """What is answered about each key, many at once, without None; `faults` say why some are missing."""

        def ask(key: StoredKey) -> T | None:
            try:
                # After the first fault the others would only be waited for in vain.
                return None if faults else question(key)
            except CallError as error:
                faults.append(error)
                return None

        permit = self._breaker.admit()
        if permit is None:
            faults.append(CallError(MissCause.UNAVAILABLE, self._breaker.reason))
            return {}
        key_to_answer: dict[StoredKey, T] = {}
        try:
            started = [(key, self._calls.start(partial(ask, key), deadline)) for key in keys]
            for key, future in started:
                found = self._calls.finish(future, deadline)
                if found is not None:
                    key_to_answer[key] = found
        except CallError as error:
            faults.append(error)
        except BaseException:
            permit.abandon()
            raise
        if faults:
            permit.fail(str(faults[0]))
        else:
            permit.succeed()
        return key_to_answer

    def _delete(self, keys: Sequence[StoredKey]) -> int:
        deadline = Deadline(self._timeout_s)
        faults: list[CallError] = []
        key_to_size = (
            self._ask_all(keys, self._bucket.size_of, deadline, faults=faults) if keys else {}
        )
        if faults:
            self._books.count_unreached()
        if not key_to_size:
            return 0
        try:
            self._call(lambda: self._bucket.delete(list(key_to_size)), deadline)
        except CallError as error:
            self._books.count_unreached()
            _LOGGER.warning(
                "%s: %d objects were not deleted: %s", self.name, len(key_to_size), error
            )
            return 0
        self._books.count_deleted(len(key_to_size), sum(key_to_size.values()))
        return len(key_to_size)
