"""Tiers as users ask for them: settings that know how to open the tier they describe.

    LLM(model, tiers=[Host("4GB"), Disk("~/.cache/kvkeep", "50GB"), Remote("redis://store:6379")])

The same as text or TOML: kvkeep.config.tier_tables and kvkeep.tiers.floors.
"""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Protocol

import psutil

from kvkeep.config import parse_bytes
from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError
from kvkeep.policies import make_policy
from kvkeep.tiers.base import Occasion, Tier
from kvkeep.tiers.disk import LEAST_CAPACITY, DiskTier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.objects import ObjectTier
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.resp_url import RESP_SCHEMES, hide_password, parse_resp_url

__all__ = [
    "OBJECT_SCHEMES",
    "REMOTE_SCHEMES",
    "Disk",
    "Host",
    "Remote",
    "TierSettings",
    "machine_memory_bytes",
]

OBJECT_SCHEMES = ("s3",)
REMOTE_SCHEMES = (*RESP_SCHEMES, *OBJECT_SCHEMES)
_ALL = tuple(str(occasion) for occasion in Occasion)
_ON_DISK = ("reused", "idle", "evicted", "closing")
_FAR_AWAY = ("finished", "reused", "idle", "closing")
# What receipts call memory above all tiers.
_TAKEN_NAMES = ("device",)
# Stands for the total while it is not known, to check how a size is written.
_ANY_TOTAL = 2**40
_RESP_FIELDS = ("ttl_s", "key_prefix")
_OBJECT_FIELDS = ("endpoint", "region", "access_key", "secret_key")
_SECRETS = ("access_key", "secret_key")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class TierSettings(Protocol):
    """What a tier is to be. Third parties write their own: see ExtensionGroup.TIERS.

    `kind` is the tier's name unless `name` gives another, `write_on` names the occasions (see Occasion) on
    which blocks are written to it.
    """

    @property
    def kind(self) -> str:
        """The word for such tiers."""

    @property
    def name(self) -> str | None:
        """What this one is called in receipts and statistics."""

    @property
    def write_on(self) -> Sequence[str]:
        """Names of occasions."""

    def open(self, name: str) -> Tier:
        """The tier, under this name. Raises ConfigError for what cannot be on this machine."""


@dataclass(frozen=True, slots=True)
class Host:
    """Memory of this machine: `capacity` in bytes, "4GB" or a share of the memory there is ("20%")."""

    kind: ClassVar[str] = "host"

    capacity: int | str
    _: KW_ONLY
    policy: str = "lru"
    write_on: tuple[str, ...] = _ALL
    name: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)

    def open(self, name: str | None = None) -> Tier:
        """Allocate it."""
        capacity = parse_bytes(self.capacity, total_bytes=machine_memory_bytes())
        return HostTier(capacity, policy=self.policy, name=name or self.name or self.kind)


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder: `capacity` in bytes, "50GB" or a share of the whole file system ("20%").

    `durable` waits for the medium at every write, so that a power failure takes nothing with it. As it comes,
    blocks are written when they prove useful, not when they are computed: that is what wears a disk.
    """

    kind: ClassVar[str] = "disk"

    folder: str | Path
    capacity: int | str
    _: KW_ONLY
    durable: bool = False
    policy: str = "lru"
    write_on: tuple[str, ...] = _ON_DISK
    name: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        _check_disk(self.folder, durable=self.durable)
        if parse_bytes(self.capacity, total_bytes=_ANY_TOTAL) < LEAST_CAPACITY:
            raise ConfigError(f"capacity={self.capacity!r} holds no file; give 4096 bytes or more")

    def open(self, name: str | None = None) -> Tier:
        """Make the folder where it is absent, and find what is in it."""
        folder = Path(self.folder).expanduser()
        return DiskTier(
            folder,
            parse_bytes(self.capacity, total_bytes=_file_system_bytes(folder)),
            policy=self.policy,
            durable=self.durable,
            name=name or self.name or self.kind,
        )


@dataclass(frozen=True, slots=True)
class Remote:
    """A store that machines share: "redis://host", see kvkeep.tiers.resp_url, or "s3://bucket/prefix".

    Where `timeout_s`, for a whole call, or `num_connections` is None it is as usual for such a store. RESP
    servers only: `ttl_s`, after which the server forgets a block, and `key_prefix`. Object stores only:
    `endpoint`, `region`, `access_key` and `secret_key`; without them the store's own tools decide.
    """

    kind: ClassVar[str] = "remote"

    url: str
    _: KW_ONLY
    timeout_s: float | None = None
    ttl_s: float | None = None
    num_connections: int | None = None
    key_prefix: str | None = None
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = None
    write_on: tuple[str, ...] = _FAR_AWAY
    name: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        _check_url(self.url)
        for name in ("timeout_s", "ttl_s", "num_connections"):
            _check_positive(name, getattr(self, name))
        if isinstance(self.num_connections, float):
            raise ConfigError(
                f"num_connections={self.num_connections!r} is no count; give 1 or more"
            )
        if self._is_resp:
            parse_resp_url(self.url)
        others = _OBJECT_FIELDS if self._is_resp else _RESP_FIELDS
        for name in others:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} means nothing to {self._scheme}://; leave it out, or give another url"
                )

    def __repr__(self) -> str:
        changed = {
            one.name: "***" if one.name in _SECRETS else getattr(self, one.name)
            for one in fields(self)
            if one.name != "url" and getattr(self, one.name) != one.default
        }
        options = "".join(f", {name}={value!r}" for name, value in changed.items())
        return f"Remote({hide_password(self.url)!r}{options})"

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def _is_resp(self) -> bool:
        return self._scheme in RESP_SCHEMES

    def open(self, name: str | None = None) -> Tier:
        """The tier; a server that does not answer is no error, but what it has is absent meanwhile."""
        name = name or self.name or self.kind
        names = (
            "timeout_s",
            "num_connections",
            *(_RESP_FIELDS if self._is_resp else _OBJECT_FIELDS),
        )
        # Of the types that the fields have: __post_init__ has looked.
        given: dict[str, Any] = {one: getattr(self, one) for one in names}
        given = {one: value for one, value in given.items() if value is not None}
        if self._is_resp:
            return RespTier(self.url, name=name, **given)
        return ObjectTier(self.url, name=name, **given)


def _check_common(settings: Host | Disk | Remote) -> None:
    _check_occasions(settings.write_on)
    _check_name(settings.name)
    if not isinstance(settings, Remote):
        parse_bytes(settings.capacity, total_bytes=_ANY_TOTAL)
        _check_policy(settings.policy)


# What users pass may be of any type, whatever is written beside the fields.


def _check_occasions(write_on: object) -> None:
    if isinstance(write_on, str) or not isinstance(write_on, Collection):
        raise ConfigError(
            f"write_on={write_on!r} is no tuple; give names of occasions, () for none"
        )
    for occasion in write_on:
        if occasion not in _ALL:
            hint = nearest_hint(str(occasion), _ALL)
            raise ConfigError(f"write_on={write_on!r} holds {occasion!r}; {hint}")


def _check_name(name: object) -> None:
    is_name = isinstance(name, str) and bool(name.strip()) and name not in _TAKEN_NAMES
    if name is not None and not is_name:
        raise ConfigError(f"name={name!r} cannot be a tier's; give another, or None for the usual")


def _check_policy(policy: object) -> None:
    if not isinstance(policy, str):
        raise ConfigError(f"policy={policy!r} is no name; write one such as lru")
    make_policy(policy)


def _check_disk(folder: object, *, durable: object) -> None:
    if not isinstance(folder, str | Path) or not str(folder).strip():
        raise ConfigError(f"folder={folder!r} is no path; give the folder to keep blocks in")
    if not isinstance(durable, bool):
        raise ConfigError(f"durable={durable!r} is not a bool; give True or False")


def _check_url(url: object) -> None:
    scheme = url.partition("://")[0] if isinstance(url, str) else ""
    if scheme not in REMOTE_SCHEMES:
        shown = hide_password(str(url))
        hint = nearest_hint(scheme, REMOTE_SCHEMES)
        raise ConfigError(f"url={shown!r} is no address of a store; {hint}")


def _check_positive(name: str, value: object) -> None:
    if value is None:
        return
    # NaN compares false with everything.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise ConfigError(
            f"{name}={value!r} is no positive number; give one, or None for the usual"
        )


def machine_memory_bytes() -> int:
    """Memory of the machine, or of the container where that has less."""
    total: int = psutil.virtual_memory().total
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _file_system_bytes(folder: Path) -> int:
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    return shutil.disk_usage(existing).total
