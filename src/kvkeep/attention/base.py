"""The contract of an attention backend: write a step's K/V into the arena, then attend to what lies there.

Legend of shapes, here and in the implementations: T packed tokens of a step, H query heads, K key/value
heads, D head size, B items of a batch, Q queries of an item, S positions an item reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvkeep.attention.inputs import GroupInputs, Item

__all__ = ["AttentionBackend", "AttentionTerms"]


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What a layer adds to softmax(q k^T) v.

    Scores are multiplied by `scaling`, then squashed to `softcap * tanh(scores / softcap)`; `sinks_H` are
    learned logits, one a head, that take part in the softmax and carry no value.
    """

    scaling: float
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sinks_H is None

    def is_same(self, other: "AttentionTerms") -> bool:
        """Whether both are the same numbers, learned ones by identity."""
        return (self.scaling, self.softcap) == (other.scaling, other.softcap) and (
            self.sinks_H is other.sinks_H
        )


class AttentionBackend(Protocol):
    """One instance serves all layers of a model; `group` and `layer` number as in the spec.

    The caller guarantees that every layer of a step is written before it is attended to, and that all
    positions before an item's own are in the arena or written in the same step.
    """

    def inputs(self, group: int, items: Sequence[Item]) -> GroupInputs:
        """Where a step's items, packed in the order of their rows, are written and what they read."""

    def write(
        self, inputs: GroupInputs, group: int, layer: int, k_1KTD: Tensor, v_1KTD: Tensor
    ) -> None:
        """Put the keys and values of the step's T tokens where the inputs say."""

    def read(self, inputs: GroupInputs, group: int, layer: int) -> tuple[Tensor, Tensor]:
        """All positions that the step's items read, batch after batch: two tensors [1, K, sum of B*S, D]."""

    def attend(
        self,
        inputs: GroupInputs,
        group: int,
        layer: int,
        q_1HTD: Tensor,
        new_kv: tuple[Tensor, Tensor],
        terms: AttentionTerms,
    ) -> Tensor:
        """Attention of the step's T queries over the arena, shape [1, T, H, D].

        `new_kv` are the keys and values that the layer wrote in this step, [1, K, T, D] each.
        """

    def attend_gathered(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> Tensor:
        """The same over what `read` returned, after the model has transformed it."""
