"""Biases, bans and penalties of many rows at once, against one row and one token at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeep.config import SamplingParams
from kvkeep.engine.sampler import Sampler, SampleRow, _adjusted

VOCABULARY = 90


class CountedBiases(dict[int, float]):
    """Biases that count how often they are read."""

    num_read = 0

    def __iter__(self) -> Iterator[int]:
        self.num_read += 1
        return super().__iter__()

    def items(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        self.num_read += 1
        return super().items()


class CountedTokens(list[int]):
    """A prompt that counts how often it is read."""

    num_read = 0

    def __iter__(self) -> Iterator[int]:
        self.num_read += 1
        return super().__iter__()


def random_logits(num_rows: int, seed: int) -> Tensor:
    """Logits as spread as a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCABULARY, generator=generator) * 3


def changed_alone(logits_V: Tensor, row: SampleRow) -> Tensor:
    """The logits of one row, token by token, in the order that SamplingParams gives."""
    params, counts, changed_V = row.params, Counter(row.output_ids), logits_V.clone()
    seen = {*row.prompt_ids, *row.output_ids} if params.repetition_penalty != 1 else counts
    for token_id in filter(lambda one: one < VOCABULARY, seen):
        logit, repetition = changed_V[token_id], params.repetition_penalty
        changed_V[token_id] = logit / repetition if logit > 0 else logit * repetition
    for token_id, count in counts.items():
        if token_id < VOCABULARY:
            frequency = params.frequency_penalty * torch.tensor(float(count))
            changed_V[token_id] -= params.presence_penalty + frequency
    for token_id, bias in params.logit_bias.items():
        if token_id < VOCABULARY:
            changed_V[token_id] += bias
    if len(row.output_ids) < params.min_tokens:
        for token_id in filter(lambda one: one < VOCABULARY, row.end_ids):
            changed_V[token_id] = -torch.inf
    return changed_V


def outputs_of(params: SamplingParams, prompt_ids: Sequence[int]) -> list[SampleRow]:
    """The rows of one request's outputs."""
    first = SampleRow.start(params, prompt_ids, [], eos_ids=[4, 999])
    others = [
        SampleRow.start(params, prompt_ids, [], choice=choice, eos_ids=[4, 999], first=first)
        for choice in range(1, params.n)
    ]
    return [first, *others]


def test_rows_of_many_requests_are_changed_as_each_alone() -> None:
    """Over many steps, in any company, to the last bit; rows of a request are apart, or not all there."""
    biases: Mapping[int, float] = {3: 2.5, 41: -100, 7: 0.1, 500: 3}
    base: dict[str, Any] = {"max_tokens": 400, "temperature": 1.0, "seed": 5}
    requests = [
        outputs_of(SamplingParams(**base, n=5, logit_bias=biases, min_tokens=20), [1, 2, 3]),
        outputs_of(SamplingParams(**base), [9]),
        outputs_of(SamplingParams(**base, n=3, repetition_penalty=1.3), [8, 8, 9, 700]),
        outputs_of(
            SamplingParams(
                **base, presence_penalty=0.7, frequency_penalty=0.11, logit_bias={5: 1.7}
            ),
            [1],
        ),
        outputs_of(
            SamplingParams(
                **base, n=2, repetition_penalty=0.8, frequency_penalty=-0.3, min_tokens=30
            ),
            list(range(80)),
        ),
    ]
    rows = [row for request in requests for row in request]
    rows[8].output_ids.extend(range(80))  # type: ignore[attr-defined]
    rows = [*rows[::2], *rows[1::2]]
    for step in range(40):
        present = [row for number, row in enumerate(rows) if (step + number) % 7]
        logits_BV = random_logits(len(present), step)
        kept_BV = logits_BV.clone()

        changed_BV = _adjusted(logits_BV, present)

        expected_BV = torch.stack(
            [changed_alone(*one) for one in zip(kept_BV, present, strict=True)]
        )
        assert torch.equal(changed_BV, expected_BV)
        assert torch.equal(logits_BV, kept_BV)
        for row, sampled in zip(present, Sampler().sample(logits_BV, present), strict=True):
            row.output_ids.append(sampled.token_id)  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_outputs", [1, 6])
def test_what_a_request_brings_is_read_once(num_outputs: int) -> None:
    """Neither every step nor every output reads its biases and its prompt anew."""
    biases, prompt_ids = CountedBiases({5: 1.0, 7: -2.0}), CountedTokens(range(60))
    params = SamplingParams(
        n=num_outputs, logit_bias=biases, repetition_penalty=1.1, temperature=0, max_tokens=99
    )
    biases.num_read = 0
    rows = outputs_of(params, prompt_ids)

    for step in range(10):
        sampled = Sampler().sample(random_logits(num_outputs, step), rows)
        for row, one in zip(rows, sampled, strict=True):
            row.output_ids.append(one.token_id)  # type: ignore[attr-defined]

    assert biases.num_read <= 2  # ids and values
    assert prompt_ids.num_read <= 1


def test_a_vocabulary_of_another_size_is_taken_as_it_is() -> None:
    """The ids that are known are those of the logits at hand."""
    params = SamplingParams(logit_bias={VOCABULARY - 1: 100, 2: 50}, temperature=0)
    row = SampleRow.start(params, [], [])

    tokens = [
        Sampler().sample(torch.zeros(1, size), [row])[0].token_id
        for size in (VOCABULARY, VOCABULARY - 1, VOCABULARY)
    ]

    assert tokens == [VOCABULARY - 1, 2, VOCABULARY - 1]
