"""Which content is on the device: from keys to blocks, holes allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvkeep.blocks.children import KeyChildren
from kvkeep.spec import BlockId, BlockKey

__all__ = ["BlockIndex", "Entry", "PartialMatch"]

_TOKEN_BYTES = 4
_MOST_CHILDREN_COMPARED = 64


class Entry(NamedTuple):
    """The content of a sealed block: its name, its parent's, its canonical token bytes, and who may share it.

    A NamedTuple because sealing makes one per block, and a frozen dataclass takes four times as
    long.
    """

    key: BlockKey
    parent: BlockKey
    content: bytes
    namespace: BlockKey


@dataclass(frozen=True, slots=True)
class PartialMatch:
    """A block that begins with the first `num_tokens` tokens asked for."""

    key: BlockKey
    num_tokens: int


class BlockIndex:
    """Content by key, with the children of each key for matches that end inside a block."""

    def __init__(self) -> None:
        self._key_to_block: dict[BlockKey, BlockId] = {}
        self._block_to_entry: dict[BlockId, Entry] = {}
        self._children = KeyChildren()

    def __len__(self) -> int:
        return len(self._key_to_block)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._key_to_block

    def get(self, key: BlockKey) -> BlockId | None:
        """The block that holds the content `key` names."""
        return self._key_to_block.get(key)

    def find(self, keys: Sequence[BlockKey], contents: Sequence[bytes]) -> list[BlockId | None]:
        """The block of each key, None where there is none.

        Tokens are compared on every hit, so that not even a collision of keys can give wrong K/V.
        """
        get, entries = self._key_to_block.get, self._block_to_entry
        blocks = [get(key) for key in keys]
        for at, block in enumerate(blocks):
            if block is not None and entries[block].content != contents[at]:
                blocks[at] = None
        return blocks

    def find_partial(self, parent: BlockKey, tokens: bytes) -> PartialMatch | None:
        """The child of `parent` that shares the most leading tokens with `tokens`, if any does.

        Only the newest children are compared, since a root can have one for every prompt there is.
        """
        best: PartialMatch | None = None
        for key in self._children.newest(parent, _MOST_CHILDREN_COMPARED):
            content = self._block_to_entry[self._key_to_block[key]].content
            num_tokens = _common_tokens(content, tokens)
            if num_tokens > (best.num_tokens if best else 0):
                best = PartialMatch(key, num_tokens)
        return best

    def add(self, blocks: Sequence[BlockId], entries: Sequence[Entry]) -> None:
        """Publish blocks; the caller guarantees that no key is present."""
        for block, entry in zip(blocks, entries, strict=True):
            assert entry.key not in self._key_to_block
            self._key_to_block[entry.key] = block
            self._block_to_entry[block] = entry
            self._children.add(entry.parent, entry.key)

    def discard(self, blocks: Sequence[BlockId]) -> list[BlockKey]:
        """Forget the content of blocks; returns the keys forgotten."""
        keys = []
        for block in blocks:
            entry = self._block_to_entry.pop(block)
            del self._key_to_block[entry.key]
            self._children.remove(entry.parent, entry.key)
            keys.append(entry.key)
        return keys

    def entry_of(self, block: BlockId) -> Entry | None:
        """The content of a block, None unless it has a key."""
        return self._block_to_entry.get(block)

    def key_of(self, block: BlockId) -> BlockKey | None:
        """The name of what the block holds."""
        entry = self._block_to_entry.get(block)
        return None if entry is None else entry.key

    def blocks(self) -> list[BlockId]:
        """All blocks whose content has a key."""
        return list(self._block_to_entry)

    def check(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        problems = []
        for block, entry in self._block_to_entry.items():
            if self._key_to_block.get(entry.key) != block:
                problems.append(f"block {block} is not where the index has its key")
            if not self._children.has(entry.parent, entry.key):
                problems.append(f"block {block} is not among its parent's children")
        num_children = len(self._children)
        if not len(self._block_to_entry) == len(self._key_to_block) == num_children:
            problems.append(
                f"the index has {len(self._block_to_entry)} blocks, {len(self._key_to_block)} keys "
                f"and {num_children} children"
            )
        return problems


def _common_tokens(left: bytes, right: bytes) -> int:
    """Leading tokens that both packed sequences share."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size // _TOKEN_BYTES
    for at in range(0, size, _TOKEN_BYTES):
        if left[at : at + _TOKEN_BYTES] != right[at : at + _TOKEN_BYTES]:
            return at // _TOKEN_BYTES
    return size // _TOKEN_BYTES
