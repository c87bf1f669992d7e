"""KeepCache: kvkeep as the `past_key_values` of `model.generate()`."""

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer

from kvkeep.cache import CacheStats, DropReceipt, Receipt, VerifyReport
from kvkeep.config import EngineSettings
from kvkeep.config.nearest import checked_names
from kvkeep.config.sizes import format_bytes
from kvkeep.errors import CapacityError, RequestError
from kvkeep.hf.format_probe import FormatProbe
from kvkeep.hf.generate_call import Incoming, ModelTraits, Past, read_incoming, with_names
from kvkeep.hf.generate_hooks import ForwardListener, add_listener, remove_listener
from kvkeep.hf.generate_layer import PagedLayer
from kvkeep.hf.generate_memory import DenseMemory, allocate_memory, weights_version
from kvkeep.hf.generate_rows import NoRoomError, RowLeases, Started
from kvkeep.hf.generate_states import StateLayers
from kvkeep.hf.generate_step import Columns, DenseStep
from kvkeep.hf.generate_tally import Tally
from kvkeep.planning import Coverage
from kvkeep.spec import LayerKind

__all__ = ["KeepCache"]


@checked_names
class KeepCache(Cache, ForwardListener):
    """A cache for `model.generate()` that remembers earlier calls.

    Give it the full input_ids every time: what an earlier call has computed is found by content, in any
    order and with no copying, and only the rest is computed. Memory stays within `capacity`; the
    blocks of finished calls stay until others need the room.

        cache = KeepCache(model, capacity="1GB")
        first = model.generate(**inputs, past_key_values=cache)
        second = model.generate(**longer_inputs, past_key_values=cache)  # computes what is new
        cache.last_receipt.reused_tokens

    It serves greedy search, sampling, several returned sequences, beams, assisted decoding, prompt
    lookup, left-padded batches and chunked prefill, with the model's own attention. Tokens are the same as
    with transformers' own cache. Forwards called without `generate` extend the batch at hand; `reset`
    lets go of it. Weights changed in place are noticed when a batch begins and empty the cache; after
    switching adapters call `clear`.

    `capacity` is bytes, "1GB" or a share of free memory ("20%"); `salt` goes into the names of blocks.
    `kv_format` and `kv_exact_layers` are those of EngineSettings: a quantised format is measured on the model
    right here, which takes some dozen forwards, unless the layers that stay exact are given, () for none.
    `kvkeep doctor MODEL --formats` finds them once and for all.

    Raises ConfigError for settings, CapacityError when not even two blocks fit, and UnsupportedModelError for
    models that keep something else than keys, values and states, that lie on several devices, or whose
    answers the format changes too much.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int | str = "1GB",
        block_size: int = 32,
        salt: str | None = None,
        *,
        kv_format: str = "auto",
        kv_exact_layers: tuple[int, ...] | str = "auto",
    ) -> None:
        self._model = model
        settings = EngineSettings(
            block_size=block_size,
            capacity=capacity,
            kv_format=kv_format,
            kv_exact_layers=kv_exact_layers,
        )
        self._memory = allocate_memory(model, settings, salt)
        geometry = self._memory.geometry
        self._rows = RowLeases(self._memory.cache, self._memory.arenas, self._memory.root)
        self._columns = Columns(block_size, self._memory.device)
        self._traits = ModelTraits.of(model, is_recurrent=bool(geometry.recurrent_layers))
        self._states = StateLayers(model, geometry.recurrent_layers)
        self._weights = weights_version(model)
        self._tally = Tally()
        self._last_receipt: Receipt | None = None
        self._step: DenseStep | None = None
        self._started: Started | None = None
        self._is_new_call = False
        self._is_lost = False
        super().__init__(layers=self._make_layers(self._memory))
        add_listener(model)
        self._finalizer = weakref.finalize(self, _finalize, self._rows, weakref.ref(model))
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"KeepCache(capacity={format_bytes(stats.capacity_bytes)}, "
            f"in_use={format_bytes(stats.in_use_bytes)}, "
            f"reusable={format_bytes(stats.reusable_bytes)})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RequestError(
            "a KeepCache cannot be copied and need not be: give the same object to every generate() call"
        )

    # --- what is in it -----------------------------------------------------------------------------

    @property
    def last_receipt(self) -> Receipt | None:
        """What the last call cost, all rows together; None before the first one.

        A call is one `generate()`, or the forwards since the last `reset`.
        """
        return self._receipt() or self._last_receipt

    @property
    def format_probe(self) -> FormatProbe | None:
        """What a quantised `kv_format` does to the model, None where it was not measured."""
        return self._memory.format_probe

    def coverage(self, token_ids: Sequence[int] | Tensor) -> Coverage:
        """What is known of one text's tokens. Changes nothing."""
        if isinstance(token_ids, Tensor):
            if token_ids.numel() != token_ids.shape[-1]:
                raise RequestError(
                    f"token_ids of shape {tuple(token_ids.shape)} are several texts; give one"
                )
            token_ids = token_ids.flatten().tolist()
        return self._memory.cache.coverage(self._rows.chain(token_ids))

    def stats(self) -> CacheStats:
        """Bytes and blocks in use by the last batch, reusable and free."""
        return self._memory.cache.stats()

    def verify(self) -> VerifyReport:
        """Check every invariant of the bookkeeping. Changes nothing."""
        return self._memory.cache.verify()

    def clear(self) -> DropReceipt:
        """Let go of the batch and forget all content."""
        self.reset()
        return self._memory.cache.clear()

    def reset(self) -> None:
        """Let go of the batch; its full blocks stay known. The next forward begins a new one."""
        self._begin_call(is_generate=False)

    def close(self) -> None:
        """Let go of the batch and of the model's hooks; the cache serves no more forwards."""
        self.reset()
        self._finalizer()

    # --- a forward ---------------------------------------------------------------------------------

    @property
    def _is_user_defined(self) -> bool:
        """Set by `generate` on a cache that it was given: the sign that a new call begins."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._begin_call(is_generate=True)

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Find what is known, make room for the rest; the arguments with known columns cut off."""
        self._abort()
        self._check_forward(model)
        rows, arguments = self._rows, with_names(self._traits, args, kwargs)
        past = Past(rows.num_columns, rows.pads, rows.is_opaque, self._is_new_call)
        incoming = read_incoming(self._traits, arguments, past)
        if not past.num_columns:
            self._begin_batch()
        try:
            started = rows.begin(incoming)
        except NoRoomError:
            raise self._no_room(incoming) from None
        if started.num_skipped and self._states:
            self._states.load(rows.states(started))
        self._tally.propose(past, incoming, started, checks_candidates=self._states.records_past)
        if self._memory.kernels is not None:
            self._memory.kernels.num_threads = torch.get_num_threads()
        self._started = started
        self._step = DenseStep(self._memory.arenas.arenas, self._columns, rows.rows, started)
        if started.num_skipped:
            for name in ("input_ids", "position_ids"):
                if arguments.get(name) is not None:
                    arguments[name] = arguments[name][..., started.num_skipped :]
        return arguments

    def after_forward(self, *, succeeded: bool) -> None:
        """Publish what the forward has written, or undo its beginning."""
        started = self._started
        if not succeeded:
            self._abort()
        elif started is not None:
            if self._rows.is_checkpoint(started):
                self._rows.keep_states(started, self._states.split(len(started.leaders)))
            try:
                self._rows.finish(started)
            except NoRoomError:
                raise self._no_room(None) from None
            finally:
                self._started = self._step = None
            self._tally.accept()
            self._is_new_call = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; returns those of all columns, [B, K, S, D].

        Columns of left padding that an earlier forward has seen are zeros.
        """
        if self._step is None:
            raise RequestError(
                "this KeepCache did not see the forward begin; give it to calls of the model that it was "
                "made for, model(...) or model.generate(...), not to another model or to a part of it"
            )
        memory = self._memory
        if key_states.dtype is not memory.dtype or key_states.device != memory.device:
            raise RequestError(
                f"keys are {key_states.dtype} on {key_states.device}, but the model was {memory.dtype} on "
                f"{memory.device} when its KeepCache was made; leave autocast, or make a new KeepCache for "
                "the converted model"
            )
        return self._step.update(memory.geometry.places[layer_idx], key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the forward, those found in the cache included."""
        return self._rows.num_columns if self._started is None else self._started.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many columns `update` returns, and the first of them: all layers keep all columns."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 when there is none."""
        return len(self._rows.rows) or -1

    def dense(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """A copy of one layer's keys and values, [B, K, S, D]; None for an empty batch."""
        rows, stop = self._rows, self._rows.num_columns
        if not stop:
            return None
        leaders = tuple(range(len(rows.rows)))
        whole = Started(stop, stop, 0, 0, leaders, leaders)
        place = self._memory.geometry.places[layer_idx]
        step = DenseStep(self._memory.arenas.arenas, self._columns, rows.rows, whole)
        return step.read(place, len(leaders))

    # --- what strategies do to a batch -------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `b` becomes what row `beam_idx[b]` was; rows that continue one another share blocks."""
        self._abort()
        if self._rows.num_columns:
            try:
                self._rows.select(beam_idx.tolist())
            except NoRoomError:
                raise self._no_room(None) from None
            self._states.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that share blocks."""
        self.reorder_cache(torch.arange(len(self._rows.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns (a number up to zero)."""
        if tokens_to_remove > 0:
            raise RequestError(
                f"tokens_to_remove={tokens_to_remove} is positive; give how many to remove as a number "
                "up to zero"
            )
        self._abort()
        self._states.crop(tokens_to_remove)
        if tokens_to_remove:
            self._rows.truncate(max(0, self._rows.num_columns + tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Columns will be taken back: keep what `crop` needs for that."""
        self._states.record_past()

    # --- parts -------------------------------------------------------------------------------------

    def _make_layers(self, memory: DenseMemory) -> list[Any]:
        geometry = memory.geometry
        layers: list[Any] = []
        for at in range(max([*geometry.places, *geometry.recurrent_layers]) + 1):
            if at in geometry.recurrent_layers:
                layers.append(self._states.layers[at])
            elif at in geometry.consumers or at not in geometry.places:
                layers.append(DummyLayer())
            else:
                layers.append(PagedLayer(self, at))
        return layers

    def _begin_call(self, *, is_generate: bool) -> None:
        self._abort()
        self._last_receipt = self.last_receipt
        self._tally = Tally(is_generate=is_generate)
        self._rows.release()
        self._states.reset()
        self._is_new_call = is_generate
        self._is_lost = False

    def _begin_batch(self) -> None:
        """Forget what was computed with other weights."""
        weights = weights_version(self._model)
        if weights != self._weights:
            self._weights = weights
            self._memory.cache.clear()

    def _abort(self) -> None:
        started, self._started, self._step = self._started, None, None
        if started is not None:
            self._rows.abort(started)
            # Its layers may have moved their states on, and no copy of those before was kept.
            self._is_lost = bool(self._states)

    def _receipt(self) -> Receipt | None:
        return self._tally.receipt([row.num_tokens for row in self._rows.rows])

    def _check_forward(self, model: nn.Module) -> None:
        if model is not self._model:
            raise RequestError(
                "this KeepCache was made for another model object; make one with KeepCache(model)"
            )
        if model.training or torch.is_grad_enabled():
            raise RequestError(
                "KeepCache keeps no gradients; call model.eval() and run under torch.no_grad() or "
                "torch.inference_mode(), or train with use_cache=False"
            )
        if self._is_lost:
            raise RequestError(
                "an earlier forward failed midway and left a recurrent state undefined; call reset() and "
                "give the whole input again"
            )

    def _no_room(self, incoming: Incoming | None) -> CapacityError:
        cache = self._memory.cache
        spec, rows = cache.spec, self._rows
        lengths = [rows.num_columns - pad for pad in rows.pads]
        if incoming is not None:
            stop = rows.num_columns + incoming.num_columns
            lengths = [stop - pad for pad in incoming.pads]
        blocks = sum(spec.num_blocks(length) for length in lengths)
        held = min(
            count
            for count, group in zip(cache.num_blocks(), spec.groups, strict=True)
            if group.kind is not LayerKind.RECURRENT
        )
        return CapacityError(
            f"capacity={format_bytes(cache.stats().capacity_bytes)} is {held} blocks of {spec.block_size} "
            f"tokens, but {len(lengths)} rows of together {sum(lengths)} tokens need up to {blocks} "
            f"({format_bytes(blocks * spec.block_bytes())}); give KeepCache more capacity, or generate with "
            "fewer rows, beams or tokens"
        )


def _finalize(rows: RowLeases, model_reference: "weakref.ReferenceType[PreTrainedModel]") -> None:
    rows.release()
    remove_listener(model_reference)
