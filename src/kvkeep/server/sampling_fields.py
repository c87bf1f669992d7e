"""How tokens are chosen, as request bodies write it; what they leave out is as the model's makers advise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field

from kvkeep.config import SamplingParams
from kvkeep.config.grammar import Grammar
from kvkeep.errors import RequestError
from kvkeep.server.block_fields import shown
from kvkeep.server.body_limits import FewEntries, FewFields
from kvkeep.server.call_syntax import CallSyntax

__all__ = [
    "MAX_CHOICES",
    "SamplingDefaults",
    "SamplingRequest",
    "refuse_unsupported",
    "sampling_params",
]

_T = TypeVar("_T")

# As many outputs and stop texts as one request may ask for: each costs work in every step.
MAX_CHOICES = 128
_MAX_STOPS = 64
_MAX_BIAS = 100.0
_TOKEN_ID = re.compile(r"[0-9]{1,10}")

# What some clients send and this server cannot do, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class SamplingRequest(BaseModel):
    """The fields of a request body that say how tokens are chosen; null is as if left out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: off")
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: FewFields[float] | None = Field(None, description="token id to -100 to 100")
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | FewEntries[str] | None = None
    stop_token_ids: FewEntries[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a model's makers recommend, for requests that say nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, generation_config: object) -> Self:
        """Those of a checkpoint's generation_config; what it says is greedy stays greedy."""
        found: dict[str, Any] = {}
        for field in cls.__dataclass_fields__:
            value = getattr(generation_config, field, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[field] = value
        if getattr(generation_config, "do_sample", None) is False:
            found["temperature"] = 0.0
        return cls(**found)


def sampling_params(
    request: SamplingRequest,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    calls: CallSyntax | None = None,
) -> SamplingParams:
    """What `request` asks for, with `calls` so that calls of tools are seen in the text.

    Raises ConfigError or RequestError naming the field.
    """
    stop = request.stop if request.stop is not None else ()
    if not isinstance(stop, str) and len(stop) > _MAX_STOPS:
        raise RequestError(f"stop has {len(stop)} texts; give at most {_MAX_STOPS}")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_first(request.temperature, defaults.temperature),
        top_p=_first(request.top_p, defaults.top_p),
        top_k=0 if request.top_k == -1 else _first(request.top_k, defaults.top_k),
        min_p=_first(request.min_p, defaults.min_p),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_first(request.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, 0.0),
        logit_bias=_biases(request.logit_bias or {}, vocab_size),
        seed=request.seed,
        n=_first(request.n, 1),
        stop=stop,
        stop_token_ids=request.stop_token_ids or (),
        include_stop=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        skip_special_tokens=request.skip_special_tokens is not False
        and not (calls is not None and calls.shows_special),
        logprobs=logprobs,
        grammar=grammar,
    )


def refuse_unsupported(extras: Mapping[str, object] | None) -> None:
    """Raise RequestError for a field that would change the answer and that this server cannot follow."""
    for name, value in (extras or {}).items():
        neutral: Sequence[object] | None = _UNSUPPORTED.get(name)
        if neutral is not None and value is not None and value not in neutral:
            raise RequestError(f"{name}={shown(value)} is not supported; leave it out")


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _biases(written: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    """Biases by token id; JSON writes the ids as text."""
    biases = {}
    for token, bias in written.items():
        if not _TOKEN_ID.fullmatch(token) or int(token) >= vocab_size:
            raise RequestError(
                f"logit_bias={token!r:.40} is no token id; give whole numbers below {vocab_size}"
            )
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise RequestError(f"logit_bias={bias} is out of range; give -100 to 100")
        biases[int(token)] = bias
    return biases
