"""What a group's part of a block is called below the device, and how it gets there."""

from kvkeep.blocks import Entry, stored_key
from kvkeep.spec import KVSpec
from kvkeep.tiers.base import Occasion, PutOutcome
from kvkeep.tiers.reading import stored_parts
from kvkeep.tiers.stack import TierStack
from kvkeep.tiers.stored_form import StoredHeader, checksum, header_bytes

__all__ = ["put_block", "wanted_header"]


def wanted_header(
    spec: KVSpec, group: int, entry: Entry, payload_bytes: int, layout: str, checksum: bytes = b""
) -> StoredHeader:
    """The header of the object that holds a group's part of a block."""
    return StoredHeader(
        key=entry.key,
        parent=entry.parent,
        namespace=entry.namespace,
        tokens=entry.content,
        group=group,
        group_name=spec.groups[group].name,
        kv_format=spec.kv_format,
        layout=layout,
        payload_bytes=payload_bytes,
        checksum=checksum,
    )


def put_block(
    stack: TierStack,
    spec: KVSpec,
    group: int,
    entry: Entry,
    payload: memoryview,
    layout: str,
    occasion: Occasion,
    labels: bytes = b"",
) -> dict[int, PutOutcome]:
    """Write a payload, with header and labels, to the tiers that take it; what became of it in each."""
    num_bytes = payload.nbytes
    header = wanted_header(spec, group, entry, num_bytes, layout, checksum([payload]))
    parts = stored_parts(header, spec.block_size, payload)
    key = stored_key(entry.key, group)
    object_bytes = header_bytes(spec.block_size) + num_bytes
    return stack.put(key, parts, object_bytes, occasion, labels=labels)
