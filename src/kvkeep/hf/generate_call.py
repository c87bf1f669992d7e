"""What one forward of `generate`, or of a user, brings along: tokens, padding, and what may be shared.

Legend: B rows of the batch, T columns of the forward, S columns with all before it. A column is a
place in the padded batch; a position is a place in a row's own text, `column - pad`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.errors import RequestError
from kvkeep.hf.fingerprint import longest_context
from kvkeep.hf.geometry import text_config

__all__ = ["Incoming", "ModelTraits", "Past", "read_incoming", "with_names"]

# What else may be given without changing what a token's keys and values are.
_HARMLESS = frozenset(
    {
        "input_ids", "position_ids", "attention_mask", "past_key_values", "logits_to_keep", "use_cache",
        "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What decides whether a model's keys and values depend on the tokens alone.

    `regime_stop` is the first position from which on they may depend on the rest of the batch;
    `counts_columns` is true of models that see padding as positions, or carry it in a state.
    """

    parameters: tuple[str, ...]
    regime_stop: int
    counts_columns: bool

    @classmethod
    def of(cls, model: PreTrainedModel, *, is_recurrent: bool) -> "ModelTraits":
        """Learn them from the config and the signature of `model.forward`."""
        parameters = tuple(inspect.signature(model.forward).parameters)
        # Llama 4 scales queries by the number of columns before them.
        scales = bool(getattr(text_config(model), "attn_temperature_tuning", False))
        return cls(
            parameters=parameters,
            regime_stop=longest_context(model, None),
            counts_columns=scales or is_recurrent or "position_ids" not in parameters,
        )


@dataclass(frozen=True, slots=True)
class Past:
    """What the batch held before the forward.

    `is_opaque`: what it holds is not a function of known tokens. `is_new_call`: `generate` has just begun.
    """

    num_columns: int
    pads: tuple[int, ...]
    is_opaque: bool
    is_new_call: bool


@dataclass(frozen=True, slots=True)
class Incoming:
    """One forward's rows. `tokens` leave padding out; `pads` count the padding columns of each row so far.

    `max_skip` columns at its front need not be computed if their K/V are known.
    """

    num_columns: int
    tokens: list[list[int]]
    pads: tuple[int, ...]
    is_opaque: bool
    num_wanted: int | None
    max_skip: int


def with_names(
    traits: ModelTraits, args: tuple[object, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward by name."""
    return {**dict(zip(traits.parameters, args, strict=False)), **kwargs}


def read_incoming(traits: ModelTraits, arguments: Mapping[str, Any], past: Past) -> Incoming:
    """What the forward's arguments mean. Raises RequestError for what would give wrong tokens."""
    ids_BT = arguments.get("input_ids")
    shaped = ids_BT if ids_BT is not None else arguments.get("inputs_embeds")
    if shaped is None:
        raise RequestError("KeepCache needs input_ids or inputs_embeds by name; give one of them")
    if past.is_new_call and arguments.get("use_cache") is False:
        raise RequestError(
            "use_cache=False, and past_key_values is a KeepCache; leave one of the two out"
        )
    num_rows, num_columns = shaped.shape[0], shaped.shape[1]
    if past.num_columns and num_rows != len(past.pads):
        raise RequestError(
            f"input_ids has {num_rows} rows, but the cache holds a batch of {len(past.pads)}; call "
            "reset() before another batch"
        )
    stop = past.num_columns + num_columns
    pads, is_regular = _read_padding(arguments.get("attention_mask"), past, num_rows, stop)
    is_canonical = _has_own_positions(arguments.get("position_ids"), past, pads, stop)
    is_opaque = (
        past.is_opaque
        or ids_BT is None
        or not (is_regular and is_canonical)
        or stop > traits.regime_stop
        or (traits.counts_columns and any(pads))
        or any(
            value is not None and value is not False and name not in _HARMLESS
            for name, value in arguments.items()
        )
    )
    if is_opaque or ids_BT is None:
        pads = past.pads if past.num_columns else (0,) * num_rows
        tokens = [[0] * (stop - max(pad, past.num_columns)) for pad in pads]
    else:
        tokens = [
            row[max(0, pad - past.num_columns) :]
            for row, pad in zip(ids_BT.tolist(), pads, strict=True)
        ]
    wanted = _num_wanted(arguments, traits, past)
    skip = 0 if is_opaque or wanted is None else max(0, num_columns - wanted)
    return Incoming(num_columns, tokens, pads, is_opaque, wanted, skip)


def _num_wanted(arguments: Mapping[str, Any], traits: ModelTraits, past: Past) -> int | None:
    """Of how many columns, from the last one on, the caller reads the outputs; None for all."""
    if arguments.get("output_attentions") or arguments.get("output_hidden_states"):
        return None
    keep = arguments.get("logits_to_keep")
    if keep is None and "logits_to_keep" not in traits.parameters and past.is_new_call:
        return 1  # what `generate` reads of models that always return all
    return keep if isinstance(keep, int) and keep > 0 else None


def _read_padding(
    mask: object, past: Past, num_rows: int, stop: int
) -> tuple[tuple[int, ...], bool]:
    """Padding columns of each row so far, and whether the mask says nothing but left padding."""
    before = past.pads if past.num_columns else (0,) * num_rows
    if mask is None and not any(before):
        return before, True
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        if any(before):
            raise RequestError(
                "attention_mask is missing or not two-dimensional, but the batch began with left padding; "
                "give the whole two-dimensional mask in every forward"
            )
        return before, False
    if mask.shape[1] != stop:
        raise RequestError(
            f"attention_mask has {mask.shape[1]} columns, but the batch has {stop} with the tokens given; "
            "in a forward give the mask of all columns, and to generate() the full input_ids: KeepCache "
            "finds by itself what it knows of them"
        )
    real_BS = mask != 0
    num_real, leading = real_BS.sum(1), (real_BS.cumsum(1) == 0).sum(1)
    pads = tuple(leading.tolist())
    is_regular = bool((num_real + leading == stop).all())
    if not past.num_columns:
        return pads, is_regular
    if any(pad < old for pad, old in zip(pads, before, strict=True)):
        raise RequestError(
            "attention_mask now reads columns that were left padding before, and their keys and values were "
            "not kept; call reset() and give the whole input again"
        )
    # A row may turn out to have more padding only as long as it has nothing else.
    is_regular = is_regular and all(
        pad == old or old == past.num_columns for pad, old in zip(pads, before, strict=True)
    )
    return (pads if is_regular else before), is_regular


def _has_own_positions(position_ids: object, past: Past, pads: tuple[int, ...], stop: int) -> bool:
    """Whether every token has the position that it would have alone."""
    if position_ids is None:
        return not any(pads)
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != stop - past.num_columns:
        return False
    if past.is_new_call and int(position_ids.min()) > 0:
        raise RequestError(
            f"position_ids start at {int(position_ids.min())} in the first forward of generate(); give the "
            "full input_ids: KeepCache finds by itself what it knows of them"
        )
    expected = torch.arange(past.num_columns, stop, device=position_ids.device)
    if not any(pads):
        return bool((position_ids == expected).all())
    expected = expected - torch.tensor(pads, device=position_ids.device)[:, None]
    return bool(((position_ids == expected) | (expected < 0)).all())
