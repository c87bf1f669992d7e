"""Which token comes next: one choice per row of logits.

Shape suffixes:
    B  rows of the batch            V  vocabulary
    R  rows chosen at random        C  best candidates, most likely first
    L  rows that report logprobs    T  tokens with a bias, or that are forbidden
"""

import math
import secrets
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from kvkeep.config import SamplingParams
from kvkeep.config.grammar import TokenMatcher
from kvkeep.config.sampling import MAX_TOP_LOGPROBS
from kvkeep.engine.logit_changes import PenalisedRow, TokenChange, TokenCounts, penalise
from kvkeep.errors import SamplingError

__all__ = ["InvalidLogitsError", "SampleRow", "Sampled", "Sampler", "TokenLogprob"]

# Below this a temperature leaves only the most likely tokens, and a division by it nears overflow.
_MIN_TEMPERATURE = 1e-20


class InvalidLogitsError(SamplingError):
    """Logits hold NaN or +inf, or nothing but -inf; `rows` are the numbers of such rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"logits rows {list(rows)} hold NaN or +inf, or nothing but -inf, so no token can be "
            "chosen; abort these requests and check the model's weights and number type"
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token.

    `logprob` and `top` (most likely first) come from the model's own distribution: before
    penalties, temperature and truncation. They are None and empty where the request did not ask.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, kw_only=True)
class SampleRow:
    """What one output of one request brings to every choice; it lives as long as the request.

    `output_ids` is the request's own list: the caller appends each chosen token before the next
    choice. Randomness is a pure function of `noise_seed` and the position in the output, so a
    choice repeats exactly after preemption, after a lost step, and on another machine. `end_ids` are
    the tokens that end the output. `first` is the row of the request's first output, which has what is made
    once for all of them; None for that row itself.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    noise_seed: bytes
    end_ids: Collection[int] = ()
    first: "SampleRow | None" = None
    _bias: TokenChange | None = field(default=None, init=False, repr=False)
    _ban: TokenChange | None = field(default=None, init=False, repr=False)
    _prompt_counts: TokenCounts | None = field(default=None, init=False, repr=False)
    _counts: TokenCounts | None = field(default=None, init=False, repr=False)
    _matcher: TokenMatcher | None = field(default=None, init=False, repr=False)
    _num_matched: int = field(default=0, init=False, repr=False)

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        *,
        choice: int = 0,
        eos_ids: Collection[int] = (),
        first: "SampleRow | None" = None,
    ) -> "SampleRow":
        """Begin output number `choice` of `params.n`; without a seed, draw a fresh one.

        `eos_ids` are the model's end tokens.
        """
        seed = secrets.randbits(128) if params.seed is None else params.seed
        return cls(
            params=params,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            noise_seed=f"{seed}:{choice}".encode(),
            end_ids={*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)},
            first=first,
        )

    def uniform(self) -> float:
        """The random number in [0, 1) of the next position, with 53 random bits."""
        position = len(self.output_ids).to_bytes(8, "little")
        digest = blake2b(self.noise_seed + b":" + position, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def changes(self) -> list[TokenChange]:
        """What is changed next, in this order: biases, and a ban on an end before `min_tokens`."""
        first, biases = self.first or self, self.params.logit_bias
        if biases and first._bias is None:
            first._bias = TokenChange([*biases], [*biases.values()])
        is_too_early = len(self.output_ids) < self.params.min_tokens
        if is_too_early and first._ban is None:
            first._ban = TokenChange([*self.end_ids])
        found = (first._bias, first._ban if is_too_early else None)
        return [change for change in found if change is not None]

    def allowed(self) -> bytes | None:
        """What the grammar lets come next, as TokenMatcher.allowed; None without a grammar."""
        if self.params.grammar is None:
            return None
        if self._matcher is None:
            self._matcher = self.params.grammar.matcher()
        # It follows the output itself, so that a token of a lost step is never taken for one.
        self._matcher.accept(self.output_ids[self._num_matched :])
        self._num_matched = len(self.output_ids)
        return self._matcher.allowed()

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot go on, as TokenMatcher.failure; None without a grammar."""
        return None if self._matcher is None else self._matcher.failure

    def counts(self, num_vocabulary: int) -> TokenCounts:
        """The tokens that the penalties are about."""
        first = self.first or self
        if first._prompt_counts is None:
            start = frozenset(self.prompt_ids) if self.params.repetition_penalty != 1 else ()
            first._prompt_counts = TokenCounts(start, num_vocabulary)
        if self._counts is None:
            self._counts = first._prompt_counts.fork()
        self._counts.follow(self.output_ids)
        return self._counts


@dataclass(frozen=True, slots=True)
class Sampler:
    """Chooses the next token of every row of a batch.

    `num_candidates` is how many of the most likely tokens are sorted for top_p before a whole row
    is; it changes the speed, never the result.
    """

    num_candidates: int = 512

    def sample(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """Choose one token per row; a row's choice does not depend on the other rows.

        Order of the settings: penalties, biases, min_tokens, grammar, temperature, top_k, min_p, top_p,
        draw. The most likely of equals is the one of lowest id. Tokens equal to the last one kept by top_k
        or top_p are kept too. Work is done in float32 on the device of the logits, which are not
        changed; sums of probabilities are float64.

        Args:
            logits_BV: The model's logits, any floating-point type; -inf forbids a token.
            rows: One per row of the logits, in the same order.

        Raises:
            InvalidLogitsError: Some rows have no distribution; no row was sampled.
        """
        assert logits_BV.shape[0] == len(rows)
        if not rows:
            return []
        adjusted_BV = _adjusted(logits_BV, rows)
        best_B, choice_B = adjusted_BV.max(dim=-1)
        # One transfer to the host carries the check and, for greedy rows, the result.
        choice_B = choice_B.where(best_B.isfinite(), -1)
        choices = choice_B.tolist()
        if invalid := [number for number, token_id in enumerate(choices) if token_id < 0]:
            raise InvalidLogitsError(invalid)

        if drawn := [number for number, row in enumerate(rows) if not row.params.is_greedy]:
            token_ids = self._draw(
                _take(adjusted_BV, drawn), _take(best_B, drawn), [rows[number] for number in drawn]
            )
            for number, token_id in zip(drawn, token_ids, strict=True):
                choices[number] = token_id
        return _with_logprobs(logits_BV, rows, choices)

    def _draw(self, logits_RV: Tensor, best_R: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """Draw one token per row by inverting the cumulative distribution, in order of token id."""
        temperature_R = _column([row.params.temperature for row in rows], logits_RV)
        # The largest logit goes to 0 before the division, which therefore cannot overflow upwards.
        scaled_RV = logits_RV.float() - best_R.float().unsqueeze(1)
        scaled_RV /= temperature_R.clamp_min(_MIN_TEMPERATURE).unsqueeze(1)
        if truncated := [number for number, row in enumerate(rows) if _truncates(row.params)]:
            floor_R = torch.full_like(temperature_R, -torch.inf)
            floor_R[truncated] = _floor(
                _take(scaled_RV, truncated),
                [rows[number].params for number in truncated],
                self.num_candidates,
            )
            scaled_RV.masked_fill_(scaled_RV < floor_R.unsqueeze(1), -torch.inf)

        cumulative_RV = scaled_RV.exp_().cumsum(dim=-1, dtype=torch.float64)
        total_R = cumulative_RV[:, -1]
        uniform_R = _column([row.uniform() for row in rows], total_R)
        # Noise of 53 bits keeps the target below the total after rounding: there is always a token
        # behind it. "right" passes over tokens without a share.
        target_R1 = (uniform_R * total_R).unsqueeze(1)
        token_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
        token_ids: list[int] = token_R1.squeeze(1).tolist()
        return token_ids


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.min_p > 0 or params.top_p < 1


def _floor(scaled_RV: Tensor, params: Sequence[SamplingParams], num_candidates: int) -> Tensor:
    """Return floor_R: the least scaled logit that top_k, min_p and top_p keep, -inf for all.

    A floor depends on sorted values alone, so it is the same however equals are ordered and however
    many candidates are sorted.
    """
    floor_R = _column([math.log(p.min_p) if p.min_p else -math.inf for p in params], scaled_RV)
    uses_top_p = any(p.top_p < 1 for p in params)
    num_sorted = max(*(p.top_k for p in params), num_candidates if uses_top_p else 0)
    if num_sorted == 0:
        return floor_R
    num_sorted = min(num_sorted, scaled_RV.shape[1])
    sorted_RC = scaled_RV.topk(num_sorted, dim=-1).values
    last_R = [min(p.top_k, num_sorted) - 1 if p.top_k else 0 for p in params]
    kth_R = sorted_RC[range(len(params)), last_R]
    uses_top_k_R = torch.tensor([p.top_k > 0 for p in params], device=kth_R.device)
    floor_R = floor_R.maximum(kth_R.where(uses_top_k_R, -torch.inf))
    if not uses_top_p:
        return floor_R
    return floor_R.maximum(_top_p_floor(scaled_RV, sorted_RC, floor_R, params))


def _top_p_floor(
    scaled_RV: Tensor, sorted_RC: Tensor, floor_R: Tensor, params: Sequence[SamplingParams]
) -> Tensor:
    """Return the floor of top_p alone, given the floor of the settings before it."""
    top_p_R = _column([p.top_p for p in params], scaled_RV).double()
    total_R = _weights(scaled_RV, floor_R).sum(dim=-1, dtype=torch.float64)
    reached_RC = _weights(sorted_RC, floor_R).cumsum(dim=-1, dtype=torch.float64)
    num_short_R = (reached_RC < (top_p_R * total_R).unsqueeze(1)).sum(dim=-1)
    num_sorted, num_vocabulary = sorted_RC.shape[1], scaled_RV.shape[1]
    last_R = num_short_R.clamp_max(num_sorted - 1)
    top_p_floor_R = sorted_RC.gather(1, last_R.unsqueeze(1)).squeeze(1)
    top_p_floor_R = top_p_floor_R.where(top_p_R < 1, -torch.inf)
    if num_sorted == num_vocabulary:
        return top_p_floor_R
    # A flat distribution needs more than the candidates; few rows do, and only they are sorted.
    flat_R = (num_short_R == num_sorted) & (top_p_R < 1)
    if flat := flat_R.nonzero().squeeze(1).tolist():
        top_p_floor_R[flat] = _top_p_floor(
            scaled_RV[flat],
            scaled_RV[flat].sort(dim=-1, descending=True).values,
            floor_R[flat],
            [params[number] for number in flat],
        )
    return top_p_floor_R


def _weights(scaled: Tensor, floor_R: Tensor) -> Tensor:
    return scaled.exp().masked_fill_(scaled < floor_R.unsqueeze(1), 0.0)


def _adjusted(logits_BV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Return the logits that choices are made from: the same tensor where no row adjusts them."""
    if not any(row.params.adjusts_logits for row in rows):
        return logits_BV
    adjusted_BV = logits_BV.to(torch.float32, copy=True)
    penalised = [
        PenalisedRow(number, row.params, row.counts(logits_BV.shape[1]))
        for number, row in enumerate(rows)
        if row.params.needs_history
    ]
    if penalised:
        penalise(adjusted_BV, penalised)
    change_to_numbers: dict[TokenChange, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        for change in row.changes():
            change_to_numbers[change].append(number)
    for change, numbers in change_to_numbers.items():
        change.apply_to(adjusted_BV, numbers)
    for adjusted_V, row in zip(adjusted_BV, rows, strict=True):
        if (allowed := row.allowed()) is not None:
            _forbid(adjusted_V, allowed)
    return adjusted_BV


def _forbid(logits_V: Tensor, allowed: bytes) -> None:
    """Forbid in place every token without a bit in `allowed`."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), bitorder="little")
    forbidden_V = torch.ones(len(logits_V), dtype=torch.bool)
    num_known = min(len(bits), len(logits_V))
    forbidden_V[:num_known] = torch.from_numpy(bits[:num_known] == 0)
    logits_V.masked_fill_(forbidden_V.to(logits_V.device), -torch.inf)


def _with_logprobs(
    logits_BV: Tensor, rows: Sequence[SampleRow], choices: Sequence[int]
) -> list[Sampled]:
    """Attach the logprobs that rows ask for, from the unmodified logits."""
    sampled = [Sampled(token_id) for token_id in choices]
    asking = [number for number, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return sampled
    logits_LV = _take(logits_BV, asking).float()
    norm_L1 = logits_LV.logsumexp(dim=-1, keepdim=True)
    # Always the same number or none, so that the order of equals does not depend on the other rows.
    num_top = MAX_TOP_LOGPROBS if any(row.params.logprobs for row in rows) else 0
    top_LC = logits_LV.topk(min(num_top, logits_LV.shape[1]), dim=-1)
    chosen_L1 = torch.tensor([[choices[number]] for number in asking], device=logits_LV.device)
    chosen = (logits_LV.gather(1, chosen_L1) - norm_L1).squeeze(1).tolist()
    top_logprobs = (top_LC.values - norm_L1).tolist()
    top_ids = top_LC.indices.tolist()
    for place, number in enumerate(asking):
        pairs = sorted(zip(top_logprobs[place], top_ids[place], strict=True), key=_most_likely)
        top = tuple(
            TokenLogprob(token_id, logprob)
            for logprob, token_id in pairs[: rows[number].params.logprobs]
            if logprob > -math.inf
        )
        sampled[number] = Sampled(choices[number], chosen[place], top)
    return sampled


def _most_likely(pair: tuple[float, int]) -> tuple[float, int]:
    logprob, token_id = pair
    return -logprob, token_id


def _take(rows_B: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the rows of these numbers, without a copy when they are all of them."""
    return rows_B if len(numbers) == rows_B.shape[0] else rows_B[list(numbers)]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one value per row, on the device of `like`, in its type but at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(values, dtype=dtype, device=like.device)
