"""A key per tenant, apart from what it encrypts: who deletes a tenant's key has erased the tenant."""

import base64
import hashlib
import json
import os
import stat
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_bytes, token_hex
from threading import Lock

from kvkeep.errors import ConfigError, TierError

__all__ = ["FileKeyring", "Keyring", "MemoryKeyring", "TenantKey"]

_ID_BYTES = 16
_SECRET_BYTES = 32
_VERSION = 1
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# What a process that died has left behind is older than this; what is being written is younger.
_LEFTOVER_AGE_S = 60.0


@dataclass(frozen=True, slots=True)
class TenantKey:
    """`key_id`, 16 bytes, stands beside what is encrypted; `secret`, 32 bytes, is shown to nobody."""

    key_id: bytes
    secret: bytes = field(repr=False)


class Keyring(ABC):
    """Keys by tenant, any text. Any thread may call any method; faults of the medium raise TierError."""

    @abstractmethod
    def find(self, tenant: str) -> TenantKey | None:
        """The tenant's key, None when it was erased or never was. Changes nothing."""

    @abstractmethod
    def obtain(self, tenant: str) -> TenantKey:
        """The tenant's key, a new random one if there is none; it is durable when this returns."""

    @abstractmethod
    def erase(self, tenant: str) -> bool:
        """Forget the tenant's key for ever; whether there was one."""

    @abstractmethod
    def tenants(self) -> list[str]:
        """Who has a key."""


class MemoryKeyring(Keyring):
    """Keys that end with the process, and with them all that they encrypt."""

    def __init__(self) -> None:
        self._tenant_to_key: dict[str, TenantKey] = {}

    def find(self, tenant: str) -> TenantKey | None:
        return self._tenant_to_key.get(tenant)

    def obtain(self, tenant: str) -> TenantKey:
        key = self._tenant_to_key.get(tenant)
        return self._tenant_to_key.setdefault(tenant, _new_key()) if key is None else key

    def erase(self, tenant: str) -> bool:
        return self._tenant_to_key.pop(tenant, None) is not None

    def tenants(self) -> list[str]:
        return sorted(self._tenant_to_key)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A key, and which version of its file it was read from."""

    version: tuple[int, int, int]
    key: TenantKey


class FileKeyring(Keyring):
    """A folder with a file per tenant, readable by its owner alone; several processes may share it.

    Every use looks whether the file is still there, so that an erasure by one process reaches all at once.
    A file appears whole or not at all. Erasing overwrites the file before it is unlinked: that is all a
    program can do, and media that copy on write, snapshots and backups keep the bytes longer.

    Raises ConfigError when the folder cannot be made or others than its owner may write to it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self._lock = Lock()
        self._tenant_to_loaded: dict[str, _Loaded] = {}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.folder.stat().st_mode
            self._destroy_leftovers()
        except OSError as error:
            raise ConfigError(
                f"keyring={str(self.folder)!r} cannot be used ({error.strerror}); give a folder that this "
                "user may write to"
            ) from error
        if mode & _OTHERS_WRITE:
            raise ConfigError(
                f"keyring={str(self.folder)!r} may be written by others, who could replace keys; "
                f"run chmod 700 {self.folder}"
            )

    def find(self, tenant: str) -> TenantKey | None:
        path = self._path(tenant)
        try:
            status = path.stat()
        except FileNotFoundError:
            self._tenant_to_loaded.pop(tenant, None)
            return None
        except OSError as error:
            raise TierError(f"keyring: {error}; make {path} readable") from error
        version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        loaded = self._tenant_to_loaded.get(tenant)
        if loaded is None or loaded.version != version:
            key = _read_key(path, status.st_mode, tenant)
            if key is None:
                return None
            loaded = self._tenant_to_loaded[tenant] = _Loaded(version, key)
        return loaded.key

    def obtain(self, tenant: str) -> TenantKey:
        with self._lock:
            key = self.find(tenant)
            while key is None:
                self._create(tenant)
                key = self.find(tenant)
        return key

    def erase(self, tenant: str) -> bool:
        doomed = self.folder / f".erased-{token_hex(8)}"
        try:
            # Out of sight first, so that nobody reads a file that is half overwritten.
            self._path(tenant).rename(doomed)
            _sync_folder(self.folder)
            _destroy(doomed)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise TierError(
                f"keyring: {error}; the key of {tenant!r} may still be there"
            ) from error
        self._tenant_to_loaded.pop(tenant, None)
        return True

    def tenants(self) -> list[str]:
        try:
            return sorted(
                json.loads(path.read_bytes())["tenant"] for path in self.folder.glob("*.key")
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TierError(f"keyring: {error}; see the files in {self.folder}") from error

    def _path(self, tenant: str) -> Path:
        # Any text is a tenant, and few texts are file names.
        digest = hashlib.sha256(tenant.encode(errors="surrogatepass")).hexdigest()[:40]
        return self.folder / f"{digest}.key"

    def _create(self, tenant: str) -> None:
        """Make a key, unless somebody was faster."""
        key = _new_key()
        text = {
            "version": _VERSION,
            "tenant": tenant,
            "key_id": key.key_id.hex(),
            "secret": base64.b64encode(key.secret).decode(),
        }
        new = self.folder / f".new-{token_hex(8)}"
        try:
            # Readable by nobody else from its first instant, whatever the umask.
            place = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(place, "wb") as file:
                file.write(json.dumps(text).encode())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                # As atomic as a rename, and never over a key that another process has made.
                os.link(new, self._path(tenant))
            new.unlink()
            _sync_folder(self.folder)
        except OSError as error:
            raise TierError(f"keyring: {error}; no key for {tenant!r} could be kept") from error

    def _destroy_leftovers(self) -> None:
        for path in self.folder.glob(".erased-*"):
            _destroy(path)
        for path in self.folder.glob(".new-*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                    _destroy(path)


def _new_key() -> TenantKey:
    return TenantKey(token_bytes(_ID_BYTES), token_bytes(_SECRET_BYTES))


def _read_key(path: Path, mode: int, tenant: str) -> TenantKey | None:
    if mode & _OTHERS:
        raise TierError(f"keyring: {path} may be read by others; run chmod 600 {path}")
    try:
        text = json.loads(path.read_bytes())
        key = TenantKey(bytes.fromhex(text["key_id"]), base64.b64decode(text["secret"]))
        is_whole = (
            text["version"] == _VERSION
            and text["tenant"] == tenant
            and len(key.key_id) == _ID_BYTES
            and len(key.secret) == _SECRET_BYTES
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TierError(f"keyring: {path} cannot be read ({error}); restore it") from error
    if not is_whole:
        raise TierError(f"keyring: {path} is not the key of {tenant!r}; restore it")
    return key


def _destroy(path: Path) -> None:
    # Another process may clear the same leftovers.
    with suppress(FileNotFoundError):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
