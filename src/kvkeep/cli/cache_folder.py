"""What lies in a folder of blocks, without a server: listed, counted and forgotten by its labels.

A server that uses the folder at the same time reads of a purge in the folder's journal, and forgets what it
means on its device and in its other tiers as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from string import hexdigits
from time import time
from typing import TYPE_CHECKING, Any

import click

from kvkeep.cli.client import RefusedError
from kvkeep.config.durations import parse_duration

if TYPE_CHECKING:
    from kvkeep.cache.lifetimes import Labels
    from kvkeep.spec import StoredKey
    from kvkeep.tiers.disk import DiskTier

__all__ = [
    "Chosen",
    "check_key_start",
    "folder_blocks",
    "folder_groups",
    "folder_purge",
    "folder_show",
    "folder_state",
    "opened_folder",
]

# Of a tier that is only looked at: nothing is to be evicted.
_ANY_CAPACITY = 2**62
_VERIFY_S = 60.0
_PLACE = "disk"
_KEY_BYTES = 32
_LEAST_DIGITS = 8
# As a server says that there is no such block.
_NOT_FOUND = 404
# A folder that a tier has had holds the blocks, and beside them at least one of these.
_BLOCKS, _BESIDE_BLOCKS = "objects", ("index.sqlite", "ledger", "quarantine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What to forget: what fits all fields that are given. Ages are as people write them."""

    keys: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    older_than: str | None = None
    unused_for: str | None = None
    everything: bool = False
    include_pinned: bool = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """One object; `labels` is None where it has none, or none that can be read."""

    key: "StoredKey"
    num_bytes: int
    labels: "Labels | None"


def folder_state(folder: Path) -> dict[str, Any]:
    """What is there, in the form in which a server says it of a tier."""
    with opened_folder(folder) as tier:
        found = list(_objects(tier))
    used = sum(one.num_bytes for one in found)
    state = {
        "capacity_bytes": None,
        "used_bytes": used,
        "in_use_bytes": 0,
        "reusable_bytes": used,
        "free_bytes": None,
        "entries": len(found),
        "evictions": 0,
    }
    return {"object": "cache", "tiers": {_PLACE: state}, "folder": str(folder)}


def folder_groups(folder: Path, *, session: str | None, tag: str | None) -> list[dict[str, Any]]:
    """Blocks that bear the same labels as one row, the largest first."""
    with opened_folder(folder) as tier:
        found = [one for one in _objects(tier) if _has(one, session, tag)]
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    blocks: dict[tuple[object, ...], set[bytes]] = {}
    for one in found:
        labels = one.labels
        name = () if labels is None else (labels.namespace, *_users(labels))
        row = rows.setdefault(name, _row(labels))
        blocks.setdefault(name, set()).add(one.key[:_KEY_BYTES])
        row["bytes"] += one.num_bytes
        row["tiers"][_PLACE] += 1
        expires_at = None if labels is None else _time(labels.expires_at)
        if row["expires_at"] is not None:
            row["expires_at"] = None if expires_at is None else max(row["expires_at"], expires_at)
    for name, row in rows.items():
        row["blocks"] = len(blocks[name])
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def folder_blocks(folder: Path, *, session: str | None, tag: str | None) -> list[dict[str, Any]]:
    """Every block by itself, the largest first."""
    with opened_folder(folder) as tier:
        found = [one for one in _objects(tier) if _has(one, session, tag)]
    rows: dict[bytes, dict[str, Any]] = {}
    for one in found:
        key = one.key[:_KEY_BYTES]
        own = {"object": "cache.entry", "id": key.hex(), "blocks": 1}
        row = rows.setdefault(key, _row(one.labels) | own)
        row["bytes"] += one.num_bytes
        row["tiers"][_PLACE] += 1
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["id"]))


def folder_show(folder: Path, key: str) -> dict[str, Any]:
    """One block by its key in hex, without or with the number of a KV group, or by its first digits."""
    with opened_folder(folder) as tier:
        stored = list(_objects(tier))
    wanted = _key(key, stored)
    found = [one for one in stored if one.key.startswith(wanted)]
    if not found:
        raise RefusedError(
            _NOT_FOUND,
            f"{folder} has no block {key}; kvkeep cache ls --blocks --folder {folder} has all keys",
        )
    row = _row(found[0].labels)
    return {
        "id": wanted.hex(),
        "objects": [one.key.hex() for one in found],
        "bytes": sum(one.num_bytes for one in found),
        **{name: row[name] for name in ("sessions", "shared", "tags", "pins", "expires_at")},
    }


def folder_purge(folder: Path, chosen: Chosen, *, dry_run: bool) -> dict[str, Any]:
    """Forget what is chosen; the receipt of a purge, in the form in which a server gives it.

    When a block was last used is in no folder: `unused_for` counts from when it was computed.
    """
    now_s = time()
    before_s = min(
        [
            now_s - parse_duration(field, value)
            for field, value in (
                ("older_than", chosen.older_than),
                ("unused_for", chosen.unused_for),
            )
            if value is not None
        ],
        default=float("inf"),
    )
    is_narrow = bool(chosen.keys or chosen.sessions or chosen.tags or before_s < float("inf"))
    if not (is_narrow or chosen.everything):
        raise click.UsageError("nothing is chosen; give KEY, --session, --tag or an age")
    with opened_folder(folder) as tier:
        stored = list(_objects(tier))
        keys = [_key(key, stored) for key in chosen.keys]
        meant = [one for one in stored if _is_meant(one, chosen, keys, before_s)]
        pinned = [] if chosen.include_pinned else [one for one in meant if _is_pinned(one)]
        spared = {one.key for one in pinned}
        going = [one for one in meant if one.key not in spared]
        num_objects = len(going) if dry_run else _delete(folder, tier, going)
    return {
        "object": "cache.purge",
        "matched": _num_blocks(meant),
        "deleted": _num_blocks(going),
        "freed_bytes": sum(one.num_bytes for one in going),
        "skipped_pinned": _num_blocks(pinned),
        "skipped_in_use": 0,
        "tiers": {_PLACE: num_objects},
        "not_reached": [],
        "dry_run": dry_run,
    }


@contextmanager
def opened_folder(folder: Path) -> Iterator["DiskTier"]:
    """The tier of a folder. Raises UsageError, and writes nothing, where no tier has had the folder."""
    from kvkeep.tiers.disk import DiskTier

    has_books = any((folder / name).exists() for name in _BESIDE_BLOCKS)
    if not (has_books and (folder / _BLOCKS).is_dir()):
        raise click.UsageError(f"{folder} is no folder of blocks; give that of a disk tier")
    with DiskTier(folder, _ANY_CAPACITY) as tier:
        tier.wait_until_verified(_VERIFY_S)
        yield tier


def _delete(folder: Path, tier: "DiskTier", going: Sequence[_Stored]) -> int:
    """Forget objects, and let servers that use the folder know; how many there were."""
    from kvkeep.cache.lifetimes import Query
    from kvkeep.cache.lifetimes.journal import PurgeJournal
    from kvkeep.spec import BlockKey

    journal, keys = PurgeJournal(folder), frozenset(BlockKey(one.key[:-1]) for one in going)
    purge_id = journal.begin(Query(keys=keys, include_pinned=True), time())
    num_deleted = tier.delete([one.key for one in going])
    journal.finish(purge_id)
    return num_deleted


def _objects(tier: "DiskTier") -> Iterator[_Stored]:
    from kvkeep.cache.lifetimes import decode_labels

    for one in tier.objects():
        encoded = tier.labels(one.key)
        labels = decode_labels(encoded) if encoded else None
        yield _Stored(one.key, one.num_bytes, labels)


def _key(text: str, stored: Sequence[_Stored]) -> bytes:
    """The key that `text` writes, or begins to write where one block alone begins so."""
    check_key_start(text)
    if len(text) >= 2 * _KEY_BYTES:
        return bytes.fromhex(text)
    blocks = {one.key[:_KEY_BYTES] for one in stored if one.key.hex().startswith(text.lower())}
    if len(blocks) != 1:
        found = "no block" if not blocks else f"{len(blocks)} blocks"
        raise RefusedError(
            _NOT_FOUND,
            f"KEY={text!r} begins {found}; kvkeep cache ls --blocks --folder FOLDER has all keys",
        )
    return bytes(blocks.pop())


def check_key_start(text: str, *, remedy: str = "") -> None:
    """Raise UsageError unless `text` can be the key of a block in hex, or its first digits."""
    is_long_enough = _LEAST_DIGITS <= len(text) < 2 * _KEY_BYTES
    is_whole = len(text) in (2 * _KEY_BYTES, 2 * _KEY_BYTES + 2)
    if not (is_long_enough or is_whole) or any(digit not in hexdigits for digit in text):
        raise click.UsageError(
            f"KEY={text!r:.80} is no key of a block; give its {2 * _KEY_BYTES} hex digits, or the first "
            f"{_LEAST_DIGITS} or more{', ' if remedy else ''}{remedy}"
        )


def _has(one: _Stored, session: str | None, tag: str | None) -> bool:
    labels = one.labels
    if labels is None:
        return session is None and tag is None
    return (session is None or session in labels.sessions) and (tag is None or tag in labels.tags)


def _is_meant(one: _Stored, chosen: Chosen, keys: list[bytes], before_s: float) -> bool:
    if keys and not any(one.key.startswith(key) for key in keys):
        return False
    labels = one.labels
    if labels is None:
        # Of what has no labels only its key is known.
        return chosen.everything or not (chosen.sessions or chosen.tags or before_s < float("inf"))
    is_own = (
        bool(labels.sessions) and not labels.is_shared and labels.sessions <= set(chosen.sessions)
    )
    return (
        (not chosen.sessions or is_own)
        and (not chosen.tags or labels.bears(set(chosen.tags)))
        and labels.created_at <= before_s
    )


def _is_pinned(one: _Stored) -> bool:
    return one.labels is not None and bool(one.labels.pins)


def _num_blocks(found: list[_Stored]) -> int:
    return len({one.key[:_KEY_BYTES] for one in found})


def _users(labels: "Labels") -> tuple[object, ...]:
    return (labels.sessions, labels.is_shared, labels.tags, labels.pins)


def _row(labels: "Labels | None") -> dict[str, Any]:
    return {
        "object": "cache.entry_group",
        "sessions": [] if labels is None else sorted(labels.sessions),
        "shared": labels is None or labels.is_shared,
        "tags": [] if labels is None else sorted(labels.tags),
        "pins": [] if labels is None else sorted(labels.pins),
        "blocks": 0,
        "tokens": None,
        "bytes": 0,
        "tiers": {_PLACE: 0},
        "used_at": None,
        "expires_at": None if labels is None else _time(labels.expires_at),
    }


def _time(seconds: float) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None
