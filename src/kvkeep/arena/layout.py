"""Where a token's keys and values lie in an arena, and how that order maps to the canonical one.

An arena is block-major: a block of all layers of its group is one contiguous run, so a move to or from the
device is one copy. Inside a block this layout has, for each layer, the keys and then the values:

    "tokens-first/1"    [layer][k: token, head, dim | v: token, head, dim]
    canonical           [layer][k: head, token, dim | v: head, token, dim]

Tokens come first because reading K/V of any positions is then one row copy per token, and because a
row holds all heads, as the model's projections write them.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from kvkeep.spec import GroupSpec

__all__ = ["BlockLayout"]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Element offsets inside a group's arena of blocks of `block_size` tokens."""

    spec: GroupSpec
    block_size: int

    name = "tokens-first/1"

    @property
    def layer_elements(self) -> int:
        """Elements of one layer in one block."""
        return self.block_size * (self.spec.k_width + self.spec.v_width)

    @property
    def block_elements(self) -> int:
        """Elements of one block."""
        return len(self.spec.layers) * self.layer_elements

    @property
    def unit(self) -> int:
        """The widest run of elements of which every row of keys or values starts at a multiple."""
        return gcd(self.spec.k_width, self.spec.v_width)

    def k_offset(self, layer: int) -> int:
        """Elements before the keys of the group's `layer`-th layer, in a block."""
        return layer * self.layer_elements

    def v_offset(self, layer: int) -> int:
        """Elements before the values of the group's `layer`-th layer, in a block."""
        return self.k_offset(layer) + self.block_size * self.spec.k_width

    def to_canonical(self, block_E: Tensor) -> Tensor:
        """A block's elements in canonical order; `block_E` has shape [block_elements]."""
        return self._reorder(block_E, tokens_first=True)

    def from_canonical(self, block_E: Tensor) -> Tensor:
        """A block's elements in this layout's order; the inverse of `to_canonical`."""
        return self._reorder(block_E, tokens_first=False)

    def _reorder(self, block_E: Tensor, *, tokens_first: bool) -> Tensor:
        spec, parts = self.spec, []
        for layer in range(len(spec.layers)):
            for start, heads, dim in (
                (self.k_offset(layer), spec.k_heads, spec.k_dim),
                (self.v_offset(layer), spec.v_heads, spec.v_dim),
            ):
                part = block_E[start : start + self.block_size * heads * dim]
                shape = (self.block_size, heads) if tokens_first else (heads, self.block_size)
                parts.append(part.view(*shape, dim).transpose(0, 1).reshape(-1))
        return torch.cat(parts)
