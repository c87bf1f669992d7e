"""Which layers a KV format hurts most, from one forward in the model's own dtype.

Legend: K key/value heads, H query heads, T packed tokens, Q tokens of a span, D head size, R vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkeep.attention import AttentionBackend, AttentionTerms, GroupInputs, Item
from kvkeep.attention.reference import reference_attention
from kvkeep.codecs import codec_of
from kvkeep.spec import GroupSpec, KVFormat, KVSpec, Span

__all__ = ["DamageMeter"]


class DamageMeter(AttentionBackend):
    """Stands before another backend and measures what the formats of `spec` would do to each layer.

    Spans are looked at by themselves, so they should be whole sequences. The measure is the error of a
    layer's attention, relative to it: a key's error counts as far as queries see it, and one that is the same
    for all keys not at all. Where a model keeps its attention to itself, the error of keys and values counts.
    """

    def __init__(self, backend: AttentionBackend, spec: KVSpec) -> None:
        self._backend = backend
        self._spec = spec
        self._items: dict[int, Sequence[Item]] = {}
        self._of_attention: dict[int, _Ratio] = {}
        self._of_rows: dict[int, _Ratio] = {}

    def ranking(self) -> list[int]:
        """The model's layers that have a quantised format, the most damaged one first."""
        found = self._of_attention or self._of_rows
        return sorted(found, key=lambda layer: (-found[layer].value(), layer))

    def inputs(self, group: int, items: Sequence[Item]) -> GroupInputs:
        """As of the backend."""
        self._items[group] = items
        return self._backend.inputs(group, items)

    def write(
        self, inputs: GroupInputs, group: int, layer: int, k_1KTD: Tensor, v_1KTD: Tensor
    ) -> None:
        """As of the backend."""
        if self._is_quantised(group, layer):
            ratio = self._of_rows.setdefault(self._number(group, layer), _Ratio())
            for x, rounded in zip(
                (k_1KTD, v_1KTD), self._rounded(group, layer, k_1KTD, v_1KTD), strict=True
            ):
                # Keys and values count alike, whatever their size.
                size = x.float().square().sum().item()
                ratio.add((x.float() - rounded).square().sum().item() / (size or 1.0), 1.0)
        self._backend.write(inputs, group, layer, k_1KTD, v_1KTD)

    def read(self, inputs: GroupInputs, group: int, layer: int) -> tuple[Tensor, Tensor]:
        """As of the backend."""
        return self._backend.read(inputs, group, layer)

    def attend(
        self,
        inputs: GroupInputs,
        group: int,
        layer: int,
        q_1HTD: Tensor,
        new_kv: tuple[Tensor, Tensor],
        terms: AttentionTerms,
    ) -> Tensor:
        """As of the backend."""
        if self._is_quantised(group, layer):
            ratio = self._of_attention.setdefault(self._number(group, layer), _Ratio())
            rounded = self._rounded(group, layer, *new_kv)
            for item in self._items[group]:
                rows = slice(item.row, item.row + len(item.span))
                mask = _mask_1QQ(self._spec.groups[group], item.span).to(q_1HTD.device)
                exact, other = (
                    reference_attention(
                        q_1HTD[:, :, rows].float(), k[:, :, rows], v[:, :, rows], mask, terms
                    )
                    for k, v in (new_kv, rounded)
                )
                ratio.add((exact - other).square().sum().item(), exact.square().sum().item())
        return self._backend.attend(inputs, group, layer, q_1HTD, new_kv, terms)

    def attend_gathered(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> Tensor:
        """As of the backend."""
        return self._backend.attend_gathered(inputs, q_1HTD, kv, terms)

    def _number(self, group: int, layer: int) -> int:
        return self._spec.groups[group].layers[layer]

    def _is_quantised(self, group: int, layer: int) -> bool:
        formats = self._spec.groups[group].formats
        return bool(formats) and (formats[layer].k.is_quantised or formats[layer].v.is_quantised)

    def _rounded(
        self, group: int, layer: int, k_1KTD: Tensor, v_1KTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        pair = self._spec.groups[group].formats[layer]
        rounded = _round_trip(pair.k, k_1KTD), _round_trip(pair.v, v_1KTD)
        if group in self._spec.first_block_groups:
            for item in self._items[group]:
                stop = item.row + max(0, self._spec.block_size - item.span.start)
                rows = slice(item.row, min(stop, item.row + len(item.span)))
                for x, other in zip((k_1KTD, v_1KTD), rounded, strict=True):
                    other[:, :, rows] = x[:, :, rows].float()
        return rounded


class _Ratio:
    """A sum over another."""

    def __init__(self) -> None:
        self._error = 0.0
        self._size = 0.0

    def add(self, error: float, size: float) -> None:
        self._error += error
        self._size += size

    def value(self) -> float:
        # NaN would be in no order.
        ratio = self._error / self._size if self._size else 0.0
        return ratio if ratio == ratio else float("inf")


def _round_trip(kv_format: KVFormat, x_1KTD: Tensor) -> Tensor:
    codec = codec_of(kv_format)
    encoded = codec.encode(x_1KTD.reshape(-1, x_1KTD.shape[-1]))
    return codec.decode(encoded, torch.float32).view(x_1KTD.shape)


def _mask_1QQ(group: GroupSpec, span: Span) -> Tensor:
    """True where a token of the span reads another one of it."""
    positions = range(span.start, span.stop)
    firsts_Q1 = torch.tensor([[group.first_needed(position)] for position in positions])
    at_Q = torch.arange(span.start, span.stop)
    return ((at_Q >= firsts_Q1) & (at_Q <= at_Q[:, None])).unsqueeze(0)
