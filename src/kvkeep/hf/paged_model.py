"""A model whose K/V lie in the arena: computes spans of many requests in one of five modes.

Legend: T packed tokens, R rows of logits asked for, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvkeep.arena import ArenaGroups, RecurrentState
from kvkeep.attention import AttentionBackend, GroupInputs, Item, NativeAttention
from kvkeep.cache import Lease
from kvkeep.hf.geometry import ModelGeometry, text_config
from kvkeep.hf.hooks import decoder_configs, installed, register, running
from kvkeep.hf.latent_cache import LatentStepCache, find_expansions
from kvkeep.hf.states import split_states, stack_states
from kvkeep.hf.step_cache import DenseStepCache, PackedStepCache, layer_stubs
from kvkeep.spec import LayerKind, Span

__all__ = ["Mode", "PagedModel", "Work"]


class Mode(StrEnum):
    """How a model is run: the first that passes the self-test, in this order."""

    NATIVE = "native"  # attention reads pages; all segments of a step in one forward
    LATENT = "latent"  # the same over MLA latents, with what expands them absorbed into the queries
    GATHER = "gather"  # as native, with K/V handed back to the model, which transforms them
    HYBRID = "hybrid"  # native attention beside recurrent states; a forward for each segment
    DENSE = "dense"  # the model's own attention over dense K/V; a forward for each segment


@dataclass(frozen=True, slots=True)
class Work:
    """Spans of one request to compute; `wants_logits` asks for those behind the last token.

    With `wants_all` as well they are those behind every token of the spans.
    """

    lease: Lease
    spans: tuple[Span, ...]
    wants_logits: bool
    wants_all: bool = False


@dataclass(frozen=True, slots=True)
class _Segment:
    lease: Lease
    span: Span
    num_logits: int  # the last so many tokens' are asked for


class PagedModel:
    """Runs `model` over leases; holds no request state of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: ModelGeometry,
        arenas: ArenaGroups,
        backend: AttentionBackend,
        mode: Mode,
    ) -> None:
        self.model = model
        self.geometry = geometry
        self.mode = mode
        self.device = next(model.parameters()).device
        self._arenas = arenas
        self._backend = backend
        self._configs = decoder_configs(model)
        self._stubs = layer_stubs(geometry)
        config = text_config(model)
        num_states = getattr(config, "number_of_conv_states", 1)
        self._layer_to_expansion = find_expansions(model, geometry) if mode is Mode.LATENT else {}
        self._num_states = dict.fromkeys(geometry.recurrent_layers, num_states)
        self._state_group = next(
            (at for at, g in enumerate(geometry.spec.groups) if g.kind is LayerKind.RECURRENT), None
        )
        # Llama 4 scales queries by get_seq_length() + index instead of by position_ids.
        self._adds_index = bool(getattr(config, "attn_temperature_tuning", False))
        register()
        self._picks_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        """Compute all spans and keep their K/V; logits [R, V] of the work that wants them, in order.

        The caller guarantees that the leases were extended for the spans, and that everything before a
        span is in the arena or in an earlier span of the same request.
        """
        segments = [
            _Segment(item.lease, span, _num_logits(item, span))
            for item in work
            for span in item.spans
        ]
        if self.mode in (Mode.NATIVE, Mode.LATENT, Mode.GATHER):
            return self._run_packed(segments)
        rows: dict[int, Tensor] = {}
        for batch in self._batches(segments):
            part = [segments[at] for at in batch]
            run = self._run_dense if self.mode is Mode.DENSE else self._run_hybrid
            counts = [segment.num_logits for segment in part]
            rows.update(zip(batch, run(part).split(counts), strict=True))
        if not rows:
            return torch.empty(0, 0, device=self.device)
        return torch.cat([rows[at] for at in sorted(rows)])

    def _batches(self, segments: Sequence[_Segment]) -> list[list[int]]:
        """Which segments share a forward: single tokens with a past, where states allow it."""
        single = []
        if self.mode is Mode.HYBRID:
            single = [
                at for at, seg in enumerate(segments) if len(seg.span) == 1 and seg.span.start > 0
            ]
        alone = [[at] for at in range(len(segments)) if at not in single]
        return [*alone, *([single] if single else [])]

    def _run_packed(self, segments: Sequence[_Segment]) -> Tensor:
        positions = [p for seg in segments for p in range(seg.span.start, seg.span.stop)]
        positions_1T = torch.tensor([positions], device=self.device)
        cache = self._packed_cache(self._group_inputs(segments), self._index_offsets(positions_1T))
        with installed(self._configs, cache):
            return self._call(segments, positions_1T, cache)

    def _packed_cache(
        self, groups: Sequence[GroupInputs | None], offsets_T: Tensor | None
    ) -> PackedStepCache:
        if self.mode is Mode.LATENT:
            assert isinstance(self._backend, NativeAttention)
            return LatentStepCache(
                self.geometry,
                self._backend,
                groups,
                self._stubs,
                layer_to_expansion=self._layer_to_expansion,
                offsets_T=offsets_T,
            )
        return PackedStepCache(
            self.geometry,
            self._backend,
            groups,
            self._stubs,
            gathers=self.mode is Mode.GATHER,
            offsets_T=offsets_T,
        )

    def _run_hybrid(self, segments: Sequence[_Segment]) -> Tensor:
        state_layers = self._load_states(segments)
        cache = PackedStepCache(
            self.geometry,
            self._backend,
            self._group_inputs(segments),
            [state_layers.get(at, stub) for at, stub in enumerate(self._stubs)],
            gathers=False,
        )
        with installed(self._configs, cache):
            logits_RV = self._call(segments, self._positions(segments), cache)
        self._save_states(segments, state_layers)
        return logits_RV

    def _run_dense(self, segments: Sequence[_Segment]) -> Tensor:
        state_layers = self._load_states(segments)
        cache = DenseStepCache(
            self.geometry,
            self._backend,
            self._group_inputs(segments),
            [state_layers.get(at, stub) for at, stub in enumerate(self._stubs)],
            span=segments[0].span,
        )
        with running():
            logits_RV = self._call(segments, self._positions(segments), cache)
        self._save_states(segments, state_layers)
        return logits_RV

    def _positions(self, segments: Sequence[_Segment]) -> Tensor:
        """One row a segment; segments that share a forward have one token each."""
        return torch.tensor(
            [list(range(seg.span.start, seg.span.stop)) for seg in segments], device=self.device
        )

    def _call(self, segments: Sequence[_Segment], positions_BT: Tensor, cache: Cache) -> Tensor:
        ids = [t for seg in segments for t in seg.lease.chain.tokens(seg.span.start, seg.span.stop)]
        ids_BT = torch.tensor(ids, device=self.device).view(positions_BT.shape)
        wanted: list[int] = []
        row = 0
        for seg in segments:
            row += len(seg.span)
            wanted += range(row - seg.num_logits, row)
        is_packed = positions_BT.shape[0] == 1
        keep = torch.tensor(wanted, dtype=torch.long, device=self.device)
        arguments: dict[str, Any] = {}
        if self._picks_logits:
            # At least one row, because some heads cannot do without. Of packed rows never by number: Gemma 4
            # then drops all others before the layers that reuse K/V, and the step's rows would not fit.
            arguments["logits_to_keep"] = (
                (keep if wanted else keep.new_zeros(1)) if is_packed else 1
            )
        out: Tensor = self.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=self.mode is Mode.DENSE,
            **arguments,
        ).logits
        if not wanted:
            return out[0, :0]
        if is_packed:
            return out[0] if self._picks_logits else out[0, keep]
        return out[keep, -1]

    def _index_offsets(self, positions_1T: Tensor) -> Tensor | None:
        if not self._adds_index:
            return None
        return positions_1T[0] - torch.arange(positions_1T.shape[1], device=self.device)

    def _group_inputs(self, segments: Sequence[_Segment]) -> list[GroupInputs | None]:
        spec = self.geometry.spec
        inputs: list[GroupInputs | None] = []
        for group, group_spec in enumerate(spec.groups):
            if group_spec.kind is LayerKind.RECURRENT:
                inputs.append(None)
                continue
            items, row = [], 0
            for seg in segments:
                table = seg.lease.tables[group]
                items.append(Item(row, seg.span, table.blocks, table.read_only))
                row += len(seg.span)
            inputs.append(self._backend.inputs(group, items))
        return inputs

    def _load_states(self, segments: Sequence[_Segment]) -> dict[int, Any]:
        if self._state_group is None:
            return {}
        arena = self._arenas.states[self._state_group]
        rows = [arena.load(seg.lease.states[self._state_group]) for seg in segments]
        return stack_states(self.geometry.recurrent_layers, self._num_states, rows)

    def _save_states(self, segments: Sequence[_Segment], state_layers: dict[int, Any]) -> None:
        if self._state_group is None:
            return
        arena = self._arenas.states[self._state_group]
        states: list[RecurrentState] = split_states(state_layers, len(segments))
        for seg, state in zip(segments, states, strict=True):
            arena.save(seg.lease.states[self._state_group], state)


def _num_logits(item: Work, span: Span) -> int:
    if item.wants_logits and item.wants_all:
        return len(span)
    return int(item.wants_logits and span is item.spans[-1])
