"""The bytes of blocks as tiers keep them: an arena's own where it lies in host memory.

A recurrent state is tensors of many shapes: there the payload is eight bytes of length, that many bytes in
the safetensors format, and zeros up to a size that all states of a group share.
"""

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvkeep.arena.arena import Arena
from kvkeep.arena.base import GroupArena, Layout
from kvkeep.arena.groups import ArenaGroups
from kvkeep.arena.layout import BlockLayout
from kvkeep.arena.split_arena import SplitArena
from kvkeep.arena.word_layout import WordLayout, with_own_formats
from kvkeep.spec import BlockId, KVSpec

__all__ = ["STATE_LAYOUT", "Payloads"]

STATE_LAYOUT = "state-safetensors/1"
_LENGTH_BYTES = 8
# What a safetensors map takes beside the tensors, at the most.
_STATE_MAP_BYTES = 4096
_STATE_MAP_BYTES_OF_LAYER = 1024


class Payloads:
    """Blocks of all groups of an ArenaGroups as bytes."""

    def __init__(self, spec: KVSpec, arenas: ArenaGroups) -> None:
        self._spec = spec
        self._arenas = arenas

    def num_bytes(self, group: int, block: BlockId) -> int:
        """Bytes of the payload of a block at that place."""
        if group in self._arenas.states:
            one = self._spec.groups[group]
            in_map = _STATE_MAP_BYTES + _STATE_MAP_BYTES_OF_LAYER * len(one.layers)
            return _LENGTH_BYTES + one.state_bytes + in_map
        return self._block(group, block).nbytes

    def layout_name(self, group: int) -> str:
        """The order of the payload's bytes."""
        if group in self._arenas.states:
            return STATE_LAYOUT
        return self._arenas.arenas[group].layout.name

    def view(self, group: int, block: BlockId) -> memoryview:
        """The payload, to be read only, and only while the block keeps its content."""
        if group in self._arenas.states:
            return self._state_bytes(group, block)
        return _bytes_of(self._block(group, block).cpu())

    def target(self, group: int, block: BlockId) -> memoryview:
        """Memory for a payload that is to become the block's; `adopt` makes it so."""
        if group in self._arenas.states or self._arenas.arenas[group].device.type != "cpu":
            return memoryview(bytearray(self.num_bytes(group, block)))
        return _bytes_of(self._block(group, block))

    def adopt(self, group: int, block: BlockId, payload: memoryview, layout: str) -> bool:
        """Make `payload`, which `target` gave out and a tier filled, the block's content.

        False, and the content is nothing, when the layout is none that can be converted.
        """
        if group in self._arenas.states:
            return layout == STATE_LAYOUT and self._adopt_state(group, block, payload)
        arena, block_E = self._arenas.arenas[group], self._block(group, block)
        if arena.device.type != "cpu":
            source = torch.frombuffer(payload, dtype=torch.uint8).view(block_E.dtype)
            block_E.copy_(source)
        if layout == arena.layout.name:
            return True
        other = _other_layout(arena, layout)
        if other is None:
            return False
        _convert(block_E, other, arena.layout)
        return True

    def _block(self, group: int, block: BlockId) -> Tensor:
        return self._arenas.arenas[group].block(block)

    def _state_bytes(self, group: int, block: BlockId) -> memoryview:
        state = self._arenas.states[group].load(block)
        assert state is not None, "the state before the first token is never published"
        body = save({name: tensor.contiguous().cpu() for name, tensor in state.items()})
        size = self.num_bytes(group, block)
        assert _LENGTH_BYTES + len(body) <= size, "states of a group have one size"
        return memoryview((len(body).to_bytes(_LENGTH_BYTES, "little") + body).ljust(size, b"\0"))

    def _adopt_state(self, group: int, block: BlockId, payload: memoryview) -> bool:
        length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
        if length > payload.nbytes - _LENGTH_BYTES:
            return False
        try:
            state = load(bytes(payload[_LENGTH_BYTES : _LENGTH_BYTES + length]))
        except SafetensorError:
            return False
        device = self._arenas.device
        moved = {name: tensor.to(device) for name, tensor in state.items()}
        self._arenas.states[group].save(block, moved)
        return True


def _bytes_of(block_E: Tensor) -> memoryview:
    content: memoryview = block_E.view(torch.uint8).numpy().data
    return content


def _other_layout(arena: GroupArena, name: str) -> Layout | None:
    """The layout `name` of blocks that hold the same floats as the arena's; None where there is none."""
    spec, size = arena.layout.spec, arena.layout.block_size
    if isinstance(arena, Arena) and name == WordLayout.name:
        own = with_own_formats(spec, arena.dtype)
        return WordLayout(own, size)
    is_plain = not any(one.k.is_quantised or one.v.is_quantised for one in spec.formats)
    if name == BlockLayout.name and is_plain and not isinstance(arena, SplitArena):
        return BlockLayout(spec, size)
    return None


def _convert(block_E: Tensor, source: Layout, target: Layout) -> None:
    """Bring a block's elements from the order of one layout into that of another, where they lie."""
    block_B = block_E.view(torch.uint8)
    canonical_B = source.to_canonical(_elements(block_B, source)).view(torch.uint8)
    block_B.copy_(target.from_canonical(_elements(canonical_B, target)).view(torch.uint8))


def _elements(block_B: Tensor, layout: Layout) -> Tensor:
    """Bytes as the layout counts them: itself in bytes, or in elements of the model's dtype."""
    if isinstance(layout, WordLayout):
        return block_B
    assert isinstance(layout, BlockLayout)
    item = block_B.numel() // layout.block_elements
    return block_B.view({2: torch.int16, 4: torch.int32}[item])
