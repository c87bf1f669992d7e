"""What requests change in logits before a choice, made once for a request and applied to many rows.

Shape suffixes as in `sampler`; W: tokens of all rows' histories, one behind the other.
"""

from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvkeep.config import SamplingParams

__all__ = ["PenalisedRow", "TokenChange", "TokenCounts", "penalise"]

_FIRST_ROOM = 64


class TokenChange:
    """Biases of some tokens, or without biases a ban on them; ids that the vocabulary lacks change nothing.

    The tensors are kept for the next step.
    """

    def __init__(self, token_ids: Sequence[int], biases: Sequence[float] | None = None) -> None:
        self._token_ids = token_ids
        self._biases = biases
        self._num_vocabulary = 0
        self._known_T = torch.empty(0, dtype=torch.long)
        self._biases_T: Tensor | None = None

    def apply_to(self, logits_BV: Tensor, numbers: Sequence[int]) -> None:
        """Change the rows of these ascending numbers in place."""
        num_vocabulary, device = logits_BV.shape[1], logits_BV.device
        if num_vocabulary != self._num_vocabulary or device != self._known_T.device:
            self._make_tensors(num_vocabulary, device)
        for rows in _runs(numbers):
            logits_RV = logits_BV[rows.start : rows.stop]
            if self._biases_T is None:
                logits_RV.index_fill_(1, self._known_T, -torch.inf)
            else:
                logits_RV.index_add_(1, self._known_T, self._biases_T.expand(len(rows), -1))

    def _make_tensors(self, num_vocabulary: int, device: torch.device) -> None:
        known = [at for at, one in enumerate(self._token_ids) if one < num_vocabulary]
        ids = [self._token_ids[at] for at in known]
        self._known_T = torch.tensor(ids, dtype=torch.long, device=device)
        if self._biases is not None:
            biases = [self._biases[at] for at in known]
            self._biases_T = torch.tensor(biases, dtype=torch.float32, device=device)
        self._num_vocabulary = num_vocabulary


class TokenCounts:
    """The different tokens that penalties count, and how often each is in the output, as it grows.

    Those of `start` come first; they may not be in the output at all.
    """

    def __init__(self, start: Collection[int], num_vocabulary: int) -> None:
        self._num_vocabulary = num_vocabulary
        # Placeholders of images and the like stand in prompts with ids behind the vocabulary.
        known = [token_id for token_id in start if token_id < num_vocabulary]
        self._token_id_to_place = {token_id: place for place, token_id in enumerate(known)}
        room = len(known) + _FIRST_ROOM
        self._ids = np.empty(room, dtype=np.int64)
        self._ids[: len(known)] = known
        self._counts = np.zeros(room, dtype=np.float32)
        self._num_counted = 0

    def fork(self) -> "TokenCounts":
        """The same, for another output."""
        other = copy(self)
        other._token_id_to_place = self._token_id_to_place.copy()
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    @property
    def ids(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The tokens."""
        return self._ids[: len(self._token_id_to_place)]

    @property
    def counts(self) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        """How often each of them is in the output."""
        return self._counts[: len(self._token_id_to_place)]

    def follow(self, output_ids: Sequence[int]) -> None:
        """Count what has been added to the output."""
        for token_id in output_ids[self._num_counted :]:
            if token_id < self._num_vocabulary:
                place = self._place(token_id)  # which may make more room
                self._counts[place] += 1
        self._num_counted = len(output_ids)

    def _place(self, token_id: int) -> int:
        place = self._token_id_to_place.setdefault(token_id, len(self._token_id_to_place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        return place


@dataclass(frozen=True, slots=True)
class PenalisedRow:
    """A row of logits, what its request asks for, and the tokens that it is about."""

    number: int
    params: SamplingParams
    tokens: TokenCounts


def penalise(logits_BV: Tensor, rows: Sequence[PenalisedRow]) -> None:
    """Apply the penalties of all these rows in place."""
    lengths = [len(row.tokens.ids) for row in rows]
    device, num_vocabulary = logits_BV.device, logits_BV.shape[1]
    index_W = torch.from_numpy(
        np.concatenate([row.tokens.ids + row.number * num_vocabulary for row in rows])
    ).to(device)

    def repeated(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(device)

    flat = logits_BV.view(-1)
    logits_W = flat.gather(0, index_W)
    if any(row.params.repetition_penalty != 1 for row in rows):
        repetition_W = repeated([row.params.repetition_penalty for row in rows])
        logits_W = torch.where(logits_W > 0, logits_W / repetition_W, logits_W * repetition_W)
    if any(row.params.presence_penalty or row.params.frequency_penalty for row in rows):
        counts_W = torch.from_numpy(np.concatenate([row.tokens.counts for row in rows])).to(device)
        presence_W = repeated([row.params.presence_penalty for row in rows])
        frequency_W = repeated([row.params.frequency_penalty for row in rows])
        logits_W -= (presence_W + frequency_W * counts_W).where(counts_W > 0, 0.0)
    flat.scatter_(0, index_W, logits_W)


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """The ascending numbers as runs without a gap."""
    start = 0
    for stop in range(1, len(numbers) + 1):
        if stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1:
            yield range(numbers[start], numbers[stop - 1] + 1)
            start = stop
