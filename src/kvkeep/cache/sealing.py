"""From computed tokens to published content: names for what a step has filled."""

from collections.abc import Sequence
from itertools import repeat

from kvkeep.blocks import BlockLedger, Entry, TokenChain
from kvkeep.cache.lease import BlockTable
from kvkeep.spec import BlockId, KVSpec, LayerKind, Span

__all__ = ["block_entry", "seal_spans", "sealed_numbers", "state_entry"]


def seal_spans(
    ledger: BlockLedger, chain: TokenChain, table: BlockTable, spans: Sequence[Span]
) -> None:
    """Publish the blocks of `table` that end inside `spans`, all of whose tokens are computed."""
    for span in spans:
        start, stop = span.start // chain.block_size, span.stop // chain.block_size
        if start == stop:
            continue
        blocks = table.blocks[start:stop]
        entries = _entries(chain, start, stop)
        filled = [
            (block, entry)
            for number, block, entry in zip(range(start, stop), blocks, entries, strict=True)
            if block is not None and number not in table.read_only
        ]
        own: list[BlockId] = [block for block, _ in filled]
        ledger.seal(own, [entry for _, entry in filled])


def sealed_numbers(spec: KVSpec, spans: Sequence[Span]) -> list[int]:
    """Numbers of the blocks that a step over `spans` has published, in order."""
    size = spec.block_size
    if all(span.start // size == span.stop // size for span in spans):
        return []
    if all(group.kind is LayerKind.RECURRENT for group in spec.groups):
        number, rest = divmod(spans[-1].stop, size)
        return [] if rest else [number - 1]
    return [number for span in spans for number in range(span.start // size, span.stop // size)]


def state_entry(chain: TokenChain, position: int) -> Entry | None:
    """The name of the recurrent state before `position`, if that is a block's end."""
    number, rest = divmod(position, chain.block_size)
    return None if rest else _entries(chain, number - 1, number)[0]


def block_entry(chain: TokenChain, number: int) -> Entry:
    """The name of a full block."""
    return _entries(chain, number, number + 1)[0]


def _entries(chain: TokenChain, start: int, stop: int) -> list[Entry]:
    """The names of blocks `start <= number < stop`."""
    keys = chain.keys[start:stop]
    parents = [chain.parent_key(start), *keys[:-1]]
    contents = chain.block_content(start, stop)
    return list(map(Entry, keys, parents, contents, repeat(chain.root)))
