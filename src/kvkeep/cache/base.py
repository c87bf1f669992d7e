"""What the books expect of those who hold the bytes."""

from collections.abc import Sequence
from typing import Protocol

from kvkeep.spec import BlockId

__all__ = ["BlockStore", "PayloadStore"]


class BlockStore(Protocol):
    """Where the bytes of blocks are; groups are numbered as in the spec."""

    def copy_block(self, group: int, source: BlockId, target: BlockId) -> None:
        """Copy the whole content of `source` to `target`."""

    def reset_state(self, group: int, block: BlockId) -> None:
        """Make a recurrent state the one before the first token."""

    def poison(self, group: int, blocks: Sequence[BlockId]) -> None:
        """Make freed content unusable where that is asked for in tests; else do nothing."""


class PayloadStore(Protocol):
    """The bytes of blocks as tiers keep them: see kvkeep.arena.Payloads."""

    def num_bytes(self, group: int, block: BlockId) -> int:
        """Bytes of the payload of a block at that place."""
        ...

    def layout_name(self, group: int) -> str:
        """The order of the payload's bytes."""
        ...

    def view(self, group: int, block: BlockId) -> memoryview:
        """The payload, to be read only, and only while the block keeps its content."""
        ...

    def target(self, group: int, block: BlockId) -> memoryview:
        """Memory for a payload that is to become the block's."""
        ...

    def adopt(self, group: int, block: BlockId, payload: memoryview, layout: str) -> bool:
        """Make a filled `target` the block's content; False when the layout cannot be converted."""
        ...
