"""From a trace's ids to what the block index is asked: keys, canonical contents and entries."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from kvkeep.blocks import Entry
from kvkeep.replay.trace import TraceRequest
from kvkeep.spec import BlockKey

__all__ = ["Visit", "visits_of"]

_ROOT = BlockKey(sha256(b"kvkeep.trace/1\0").digest())


@dataclass(frozen=True, slots=True)
class Visit:
    """A request as the cache meets it.

    `keys` and `contents` are of its full input blocks, which may be known; `entries` are of all its full
    blocks, those of the output behind those of the input. `num_places` counts the partial last block too.
    """

    at_ms: float
    input_tokens: int
    num_places: int
    keys: list[BlockKey]
    contents: list[bytes]
    entries: list[Entry]


def visits_of(requests: Sequence[TraceRequest], block_tokens: int) -> list[Visit]:
    """Requests with the names of their blocks, each a hash of the name before and of the trace's id.

    A partial input block is never shared, since only full blocks have names. Output, and what lies in one
    block with it, is content that no other request has: traces do not say what it was.
    """
    # The same objects for the same content: a long trace names most blocks many times.
    known: dict[tuple[BlockKey, int], Entry] = {}
    visits = []
    for number, request in enumerate(requests):
        num_input = request.input_length // block_tokens
        num_tokens = request.input_length + request.output_length
        entries: list[Entry] = []
        parent = _ROOT
        for hash_id in request.hash_ids[:num_input]:
            entry = known.get((parent, hash_id))
            if entry is None:
                entry = known[parent, hash_id] = _entry(parent, b"%d" % hash_id)
            entries.append(entry)
            parent = entry.key
        for at in range(num_input, num_tokens // block_tokens):
            entries.append(_entry(parent, b"output %d:%d" % (number, at)))
            parent = entries[-1].key
        visits.append(
            Visit(
                at_ms=request.timestamp_ms,
                input_tokens=request.input_length,
                num_places=-(-num_tokens // block_tokens),
                keys=[entry.key for entry in entries[:num_input]],
                contents=[entry.content for entry in entries[:num_input]],
                entries=entries,
            )
        )
    return visits


def _entry(parent: BlockKey, content: bytes) -> Entry:
    return Entry(BlockKey(sha256(parent + content).digest()), parent, content, _ROOT)
