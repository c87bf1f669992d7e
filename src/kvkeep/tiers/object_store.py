"""A bucket of an S3-compatible store: addresses, accounts, and single requests through obstore."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from kvkeep.config.nearest import nearest_hint
from kvkeep.config.sizes import parse_bytes
from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Miss, MissCause, PutOutcome, StoredObject
from kvkeep.tiers.deadlines import CallError, SettingError
from kvkeep.tiers.stored_value import is_tail

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import S3Store

__all__ = ["OBJECT_URL_OPTIONS", "Bucket", "BucketAddress", "open_bucket"]

# What may follow "?" in an address.
OBJECT_URL_OPTIONS = ("max_object_bytes", "session_token")
_MAX_OBJECT_BYTES = 512 << 20
# What S3 takes in one upload without parts.
_MOST_OBJECT_BYTES = 5 << 30
_MAX_RETRIES = 3
_PAGE_OBJECTS = 1000
_MAX_LETTERS = 300
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketAddress:
    """Where a bucket is, and the account that may use it; of what is None the store's usual is taken."""

    url: str
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.access_key is None) != (self.secret_key is None):
            missing = "access_key" if self.access_key is None else "secret_key"
            raise ConfigError(f"{missing}=None beside the other key; give both, or neither")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint={self.endpoint!r} is no address; write https://host:port")


class Bucket:
    """Single requests, each of which may block for long. Raises CallError, and nothing else of a store's."""

    def __init__(self, store: "S3Store", *, shown: str, max_object_bytes: int) -> None:
        self._store = store
        self.shown = shown
        self.max_object_bytes = max_object_bytes
        self._has_ranges = True

    def check(self) -> None:
        """Raise SettingError where there is no such bucket, or the account may not list it."""
        next(self.pages(max_objects=1), None)

    def size_of(self, key: StoredKey) -> int | None:
        """The length of what is kept of an object, None where it is absent."""
        with _translated():
            try:
                return self._store.head(key.hex())["size"]
            except FileNotFoundError:
                return None

    def download(self, key: StoredKey, num_bytes: int) -> memoryview | Miss:
        """All that is kept of an object of this length; of another one only the header is read."""
        with _translated():
            try:
                answer = self._store.get(key.hex())
            except FileNotFoundError:
                return Miss(MissCause.ABSENT)
            size = answer.meta["size"]
            if not is_tail(size - num_bytes):
                return Miss(MissCause.SHORT, f"{size} bytes there, {num_bytes} wanted")
            content = memoryview(answer.bytes())
        if len(content) != size:
            return Miss(MissCause.SHORT, f"{len(content)} bytes came, {size} were announced")
        return content

    def end_of(self, key: StoredKey, length: int, num_bytes: int) -> bytes | None:
        """The last bytes of what is kept, `length` bytes, of an object; None where it is absent."""
        if not length:
            return b""
        with _translated():
            try:
                found = self._range(key, max(0, length - num_bytes), length)
                if found is None:
                    found = self._store.get(key.hex()).bytes()
            except FileNotFoundError:
                return None
        return bytes(memoryview(found)[-num_bytes:])

    def upload(self, key: StoredKey, content: bytes) -> PutOutcome:
        """Store an object unless it is there."""
        # A condition on the upload itself is unknown to some stores, and ignored by others.
        if self.size_of(key) is not None:
            return PutOutcome.PRESENT
        with _translated():
            self._store.put(key.hex(), content, use_multipart=False)
        return PutOutcome.STORED

    def delete(self, keys: Sequence[StoredKey]) -> None:
        """Delete objects; those that are absent already are no fault."""
        with _translated():
            self._store.delete([key.hex() for key in keys])

    def pages(self, *, max_objects: int = _PAGE_OBJECTS) -> Iterator[list[StoredObject]]:
        """All objects whose names are keys, with the lengths of what is kept; a request for each page."""
        listing = self._store.list(chunk_size=max_objects)
        while True:
            with _translated():
                page = next(listing, None)
            if page is None:
                return
            yield [
                StoredObject(key, item["size"])
                for item in page
                if (key := _key_of(item["path"])) is not None
            ]

    def _range(self, key: StoredKey, start: int, end: int) -> "Bytes | None":
        """A part of an object; None where the store sends parts in a way that obstore does not take."""
        if not self._has_ranges:
            return None
        try:
            return self._store.get_range(key.hex(), start=start, end=end)
        except Exception as error:
            # `rclone serve s3` sends the part, and says 200 instead of 206.
            if "non-partial" not in str(error):
                raise
            self._has_ranges = False
            return None


def open_bucket(address: BucketAddress, timeout_s: float) -> Bucket:
    """The bucket at "s3://bucket/prefix", whose single requests take at most `timeout_s`; asks for nothing.

    Raises ConfigError for an address that cannot be, and where obstore is not installed.
    """
    parts = urlsplit(address.url)
    shown = address.url.partition("?")[0]
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc:
        raise ConfigError(f"url={shown!r} is no bucket; write s3://bucket/prefix")
    options = _options(shown, parts.query)
    max_object_bytes = parse_bytes(
        options.get("max_object_bytes", _MAX_OBJECT_BYTES),
        total_bytes=_MOST_OBJECT_BYTES,
        field="max_object_bytes",
    )
    try:
        make = import_module("obstore.store").S3Store
    except ImportError as error:
        raise ConfigError(f"url={shown!r} needs obstore; pip install 'kvkeep[s3]'") from error
    store = make(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options={
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=min(timeout_s / 2, 5)),
            "allow_http": (address.endpoint or "").startswith("http://"),
        },
        # Retries are to end before the call does, so that what failed says so, and is not merely late.
        retry_config={
            "max_retries": _MAX_RETRIES,
            "retry_timeout": timedelta(seconds=timeout_s / 2),
            "backoff": {
                "init_backoff": timedelta(seconds=min(0.1, timeout_s / 20)),
                "max_backoff": timedelta(seconds=timeout_s / 8),
                "base": 2,
            },
        },
        **_account(address, options.get("session_token")),
    )
    return Bucket(store, shown=shown, max_object_bytes=min(max_object_bytes, _MOST_OBJECT_BYTES))


def _options(shown: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OBJECT_URL_OPTIONS:
            raise ConfigError(
                f"url={shown!r}: {name} is no option; {nearest_hint(name, OBJECT_URL_OPTIONS)}"
            )
    return options


def _account(address: BucketAddress, session_token: str | None) -> dict[str, Any]:
    given = {
        "endpoint": address.endpoint,
        "region": address.region,
        "access_key_id": address.access_key,
        "secret_access_key": address.secret_key,
        "session_token": session_token,
    }
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what obstore raises into CallError; who looks for one object catches its absence before."""
    try:
        yield
    except CallError:
        raise
    except Exception as error:
        raise _fault(error) from error


def _fault(error: Exception) -> CallError:
    # Whatever its class, which depends on the kind of request, an error's text has the store's own answer.
    text = " ".join(str(error).partition("Debug source:")[0].split())
    status = _STATUS.search(text)
    code = _CODE.search(text)
    reason = f"{status[1]} {code[1] if code else ''}".strip() if status else text[:_MAX_LETTERS]
    if status is not None and status[1] in ("401", "403"):
        return SettingError(
            f"the account is refused ({reason}); check access_key, secret_key and its right to list it"
        )
    if status is not None and status[1] == "404":
        return SettingError(f"there is no such bucket ({reason}); create it")
    # What the client itself has given up it says in the details alone.
    is_late = "timed out" in text or "operation timeout" in text or "kind: Timeout" in str(error)
    return CallError(MissCause.LATE if is_late else MissCause.UNAVAILABLE, reason)


def _key_of(name: str) -> StoredKey | None:
    """The key of an object's name, None for names that are none of ours."""
    try:
        key = StoredKey(bytes.fromhex(name))
    except ValueError:
        return None
    return key if key.hex() == name else None
