"""The places of tokens in an arena. Legend: T tokens."""

from torch import Tensor

__all__ = ["Slots"]


class Slots:
    """The places of T tokens in one group, for every layer of it."""

    __slots__ = ("_bases", "blocks_T", "layer_rows", "offsets_T")

    def __init__(self, blocks_T: Tensor, offsets_T: Tensor) -> None:
        self.blocks_T = blocks_T
        self.offsets_T = offsets_T
        # Row numbers of each layer, where all layers' together are small: see arena.arena.
        self.layer_rows: tuple[Tensor, ...] = ()
        self._bases: dict[int, Tensor] = {}

    def bases(self, rows_per_block: int, rows_per_token: int) -> Tensor:
        """Row numbers of the tokens in a layer that starts at row 0 of its block; computed once."""
        base = self._bases.get(rows_per_token)
        if base is None:
            base = self.blocks_T * rows_per_block + self.offsets_T * rows_per_token
            self._bases[rows_per_token] = base
        return base
