"""Whether everything in a tier is what it claims to be: every object read, summed up and compared."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Miss, MissCause, StoredObject, Tier
from kvkeep.tiers.reading import put_aside
from kvkeep.tiers.stored_form import checksum, parse_header, payload_start

__all__ = ["AuditReport", "Looked", "WrongObject", "audit", "look_at", "why_wrong"]


@dataclass(frozen=True, slots=True)
class WrongObject:
    """An object that must not be used, and why."""

    key: StoredKey
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What an audit has read; `wrong` objects were put aside if that was asked for."""

    num_objects: int
    num_bytes: int
    wrong: tuple[WrongObject, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """An object that was read; `wrong` is None where it is what it claims to be."""

    wrong: Miss | None

    @property
    def problem(self) -> str:
        """What is wrong, in words."""
        return "" if self.wrong is None else f"{self.wrong.cause}: {self.wrong.reason}"


def audit(tier: Tier, *, repair: bool, on_read: Callable[[int], None] | None = None) -> AuditReport:
    """Read every object of a tier; with `repair` the wrong ones are put aside.

    Objects of other processes that come and go meanwhile may be missed. `on_read` gets the bytes of each.
    """
    num_objects = num_bytes = 0
    wrong: list[WrongObject] = []
    for one in tier.objects():
        looked = look_at(tier, one)
        if looked is None:
            continue
        num_objects += 1
        num_bytes += one.num_bytes
        if looked.wrong is not None:
            wrong.append(WrongObject(one.key, looked.problem))
            if repair:
                put_aside(tier, one.key, looked.wrong)
        if on_read is not None:
            on_read(one.num_bytes)
    return AuditReport(num_objects=num_objects, num_bytes=num_bytes, wrong=tuple(wrong))


def look_at(tier: Tier, one: StoredObject) -> Looked | None:
    """What reading an object shows; None where it has gone by now, or its tier does not answer."""
    content = memoryview(bytearray(one.num_bytes))
    found = tier.get(one.key, [content])
    if isinstance(found, Miss) and found.cause in (MissCause.ABSENT, MissCause.UNAVAILABLE):
        return None
    return Looked(found if isinstance(found, Miss) else why_wrong(one.key, content))


def why_wrong(key: StoredKey, content: memoryview) -> Miss | None:
    """Why an object is not the block that its name promises, of whatever model; None if it is."""
    start = payload_start(content)
    found = parse_header(content[:start])
    if isinstance(found, Miss):
        return found
    if content.nbytes != start + found.payload_bytes:
        return Miss(MissCause.SHORT, f"{content.nbytes} bytes for {found.payload_bytes} of payload")
    if key != found.key + bytes([found.group]):
        return Miss(MissCause.MISMATCH, "it lies under another name")
    if found.key != sha256(found.parent + found.tokens).digest():
        return Miss(MissCause.MISMATCH, "its key is not that of its tokens")
    if checksum([content[start:]]) != found.checksum:
        return Miss(MissCause.CORRUPT, "payload checksum")
    return None
