"""The recurrent states of one group, by BlockId: one place holds the states of all its layers."""

from collections.abc import Sequence

from torch import Tensor

from kvkeep.spec import BlockId

__all__ = ["RecurrentState", "StateArena"]

# Every state tensor of every layer, under the name its layer gives it; None before the first token.
RecurrentState = dict[str, Tensor] | None


class StateArena:
    """At most `num_blocks` states. Tensors are made when a place is first written."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._states: list[RecurrentState] = [None] * num_blocks

    def load(self, block: BlockId) -> RecurrentState:
        """The state at `block`; the caller must not write into its tensors."""
        return self._states[block]

    def save(self, block: BlockId, state: RecurrentState) -> None:
        """Keep `state` at `block`; the tensors become the arena's own."""
        self._states[block] = state

    def copy(self, source: BlockId, target: BlockId) -> None:
        """Make `target` hold what `source` holds; both share tensors, which nobody writes into."""
        self._states[target] = self._states[source]

    def reset(self, blocks: Sequence[BlockId]) -> None:
        """Make the states those before the first token."""
        for block in blocks:
            self._states[block] = None
