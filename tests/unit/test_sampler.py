"""The sampler against slow references: one row at a time, whole vocabulary, plain Python."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from kvkeep.config import SamplingParams
from kvkeep.engine.sampler import InvalidLogitsError, Sampled, Sampler, SampleRow
from kvkeep.errors import KVKeepError

VOCABULARY = 50


def row(
    params: SamplingParams, prompt_ids: Sequence[int] = (), output_ids: Sequence[int] = ()
) -> SampleRow:
    """Return the sampling state of one request."""
    return SampleRow.start(params, prompt_ids, output_ids)


def random_logits(num_rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Return logits as spread as a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocabulary, generator=generator) * 3


def reference_logits(logits: Sequence[float], state: SampleRow) -> list[float]:
    """Apply the penalties token by token."""
    params, counts = state.params, Counter(state.output_ids)
    adjusted = list(logits)
    for token_id in set(state.prompt_ids) | set(state.output_ids):
        logit = adjusted[token_id]
        penalty = params.repetition_penalty
        adjusted[token_id] = logit / penalty if logit > 0 else logit * penalty
    for token_id, count in counts.items():
        adjusted[token_id] -= params.presence_penalty + params.frequency_penalty * count
    return adjusted


def reference_distribution(logits: Sequence[float], state: SampleRow) -> list[float]:
    """Return the distribution of one row: penalties, temperature, top_k, min_p, top_p, in turn."""
    params = state.params
    adjusted = reference_logits(logits, state)
    highest = max(adjusted)
    weights = [math.exp((logit - highest) / params.temperature) for logit in adjusted]
    order = sorted(range(len(weights)), key=lambda token_id: -weights[token_id])
    kept = order[: params.top_k] if params.top_k else order
    kept = [token_id for token_id in kept if weights[token_id] >= params.min_p * weights[order[0]]]
    target = params.top_p * sum(weights[token_id] for token_id in kept)
    reached, nucleus = 0.0, []
    for token_id in kept:
        nucleus.append(token_id)
        reached += weights[token_id]
        if params.top_p < 1 and reached >= target:
            break
    total = sum(weights[token_id] for token_id in nucleus)
    return [
        weights[token_id] / total if token_id in nucleus else 0.0
        for token_id in range(len(weights))
    ]


def draws(logits_V: Tensor, params: SamplingParams, num_draws: int) -> list[int]:
    """Draw many first tokens of independent requests from one row of logits."""
    sampler, tokens = Sampler(), list[int]()
    batch_BV = logits_V.expand(500, -1)
    for first in range(0, num_draws, 500):
        rows = [
            SampleRow.start(params, (), (), choice=choice) for choice in range(first, first + 500)
        ]
        tokens += [sampled.token_id for sampled in sampler.sample(batch_BV, rows)]
    return tokens


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.7),
        SamplingParams(seed=3, temperature=1.6, top_k=5),
        SamplingParams(seed=4, top_p=0.8),
        SamplingParams(seed=5, min_p=0.1),
        SamplingParams(seed=6, temperature=1.5, top_k=9, min_p=0.05, top_p=0.9),
        SamplingParams(seed=7, top_p=0.0),
        SamplingParams(seed=8, top_k=10**9, top_p=0.999999),
    ],
    ids=lambda params: f"seed{params.seed}",
)
def test_tokens_come_as_often_as_the_reference_says(params: SamplingParams) -> None:
    """Chi-square of 20 000 draws is likely, and what is cut off never comes."""
    logits_V = random_logits(1, seed=11)[0] / 2
    expected = reference_distribution(logits_V.tolist(), row(params))
    num_draws = 20_000

    counts = Counter(draws(logits_V, params, num_draws))

    assert all(expected[token_id] > 0 for token_id in counts)
    # Cells of few expected draws are pooled, as the chi-square approximation demands.
    common = [token_id for token_id, share in enumerate(expected) if share * num_draws >= 5]
    cells = [(counts[token_id], expected[token_id] * num_draws) for token_id in common]
    rest = num_draws - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((num_draws - sum(count for count, _ in cells), rest))
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    # Mean and deviation of chi-square are f and sqrt(2f); 5 deviations never happen by chance.
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("num_candidates", [1, 4, 50, 1000])
def test_the_number_of_candidates_changes_nothing(num_candidates: int) -> None:
    """Sorting few tokens or all of them gives the same tokens, even among many equal logits."""
    logits_BV = random_logits(300, seed=5).round().div(2)
    rows = [row(SamplingParams(seed=seed, top_p=seed % 10 / 10)) for seed in range(300)]
    expected = Sampler(num_candidates=VOCABULARY).sample(logits_BV, rows)

    assert Sampler(num_candidates=num_candidates).sample(logits_BV, rows) == expected


def mixed_rows(num_rows: int) -> list[SampleRow]:
    """Return rows of every kind: greedy, random, truncated, penalised, with logprobs."""
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(seed=7, temperature=0.8),
        SamplingParams(seed=8, top_p=0.7, logprobs=3),
        SamplingParams(seed=9, top_k=4, min_p=0.02),
        SamplingParams(temperature=0, repetition_penalty=1.8, logprobs=0),
        SamplingParams(seed=10, frequency_penalty=0.9, presence_penalty=-0.4, top_p=0.95),
    ]
    return [
        row(kinds[number % len(kinds)], prompt_ids=[number % 7, 3, 3], output_ids=[5, number % 11])
        for number in range(num_rows)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Alone, in any batch and in any order, a row gives the same token and the same logprobs."""
    logits_BV = random_logits(24, seed=3).to(dtype)
    rows = mixed_rows(24)
    sampler = Sampler(num_candidates=8)

    together = sampler.sample(logits_BV, rows)

    alone = [sampler.sample(logits_BV[b : b + 1], rows[b : b + 1])[0] for b in range(24)]
    backwards = sampler.sample(logits_BV.flip(0), rows[::-1])[::-1]
    assert [sampled.token_id for sampled in alone] == [s.token_id for s in together]
    assert [sampled.token_id for sampled in backwards] == [s.token_id for s in together]
    for one, other in zip(alone, together, strict=True):
        assert [t.token_id for t in one.top] == [t.token_id for t in other.top]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)


def test_the_logits_are_not_changed() -> None:
    """The caller's tensor is left as it was."""
    logits_BV = random_logits(24)
    before_BV = logits_BV.clone()

    Sampler().sample(logits_BV, mixed_rows(24))

    assert torch.equal(before_BV, logits_BV)


def test_a_seed_repeats_and_positions_differ() -> None:
    """Equal seeds give equal outputs, whatever was sampled in between; other seeds others."""
    flat_V = torch.zeros(VOCABULARY)

    def generate(seed: int | None, length: int = 40) -> list[int]:
        output_ids: list[int] = []
        state = row(SamplingParams(seed=seed), output_ids=output_ids)
        for _ in range(length):
            # The second row disturbs: it shares the batch on every other step.
            num_rows = 1 + len(output_ids) % 2
            rows = [state, row(SamplingParams())][:num_rows]
            sampled = Sampler().sample(flat_V.expand(num_rows, -1), rows)
            output_ids.append(sampled[0].token_id)
        return output_ids

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)
    assert generate(1) != generate(-1)
    assert generate(None) != generate(None)
    assert len(set(generate(1))) > 10


def test_a_step_that_is_repeated_chooses_the_same_token() -> None:
    """Sampling twice before the token is appended, as after a lost step, gives the same token."""
    logits_BV, rows = torch.zeros(1, 10_000), [row(SamplingParams())]

    assert Sampler().sample(logits_BV, rows) == Sampler().sample(logits_BV, rows)


def test_outputs_of_one_prompt_differ() -> None:
    """With n above 1, every output has its own randomness under one seed."""
    params = SamplingParams(seed=4, n=8)
    rows = [SampleRow.start(params, (), (), choice=choice) for choice in range(params.n)]

    sampled = Sampler().sample(torch.zeros(params.n, 10_000), rows)

    assert len({one.token_id for one in sampled}) == params.n


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Ties go to the lowest id, with temperature 0 and with top_k 1."""
    logits_BV = torch.zeros(2, 100_000)
    logits_BV[:, [70_000, 123, 99_999]] = 4.0
    rows = [row(SamplingParams(temperature=0)), row(SamplingParams(top_k=1))]

    assert Sampler().sample(logits_BV, rows) == [Sampled(123), Sampled(123)]


def test_top_k_keeps_equals_of_the_last_one() -> None:
    """Nothing but their order tells equals apart, so top_k keeps all of them."""
    logits_V = torch.tensor([1.0, 3.0, 1.0, 1.0, -2.0])

    assert set(draws(logits_V, SamplingParams(seed=1, top_k=2), 2000)) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """The division neither overflows nor gives NaN."""
    logits_BV = random_logits(8) * 1e4
    rows = [row(SamplingParams(temperature=temperature)) for _ in range(8)]

    tokens = [sampled.token_id for sampled in Sampler().sample(logits_BV, rows)]

    assert tokens == logits_BV.argmax(dim=-1).tolist()


def test_a_forbidden_token_never_comes() -> None:
    """A logit of -inf has no share, at any temperature, with and without penalties."""
    logits_V = torch.full((VOCABULARY,), -torch.inf)
    logits_V[[0, 17, 49]] = 0.0
    params = SamplingParams(seed=1, temperature=1000, top_p=0.999, repetition_penalty=1.5)

    assert set(draws(logits_V, params, 2000)) == {0, 17, 49}
    assert set(draws(logits_V, SamplingParams(seed=1), 2000)) == {0, 17, 49}


@dataclass(slots=True, kw_only=True)
class ScriptedRow(SampleRow):
    """A row whose noise the test decides."""

    noise: float

    def uniform(self) -> float:
        """Return the noise of the test."""
        return self.noise


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1), (0.5, 7), (1 - 2.0**-53, 7)])
def test_the_ends_of_the_noise_choose_an_allowed_token(noise: float, expected: int) -> None:
    """Noise 0 takes the first token with a share, the largest noise the last one."""
    logits_V = torch.full((9,), -torch.inf)
    logits_V[[1, 7]] = 0.0
    state = ScriptedRow(
        params=SamplingParams(), prompt_ids=(), output_ids=(), noise_seed=b"", noise=noise
    )

    assert Sampler().sample(logits_V[None], [state]) == [Sampled(expected)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_named_instead_of_sampled(bad: float, temperature: float) -> None:
    """NaN and +inf raise an error that carries the rows, so that the others can go on."""
    logits_BV = random_logits(4)
    logits_BV[1, 30] = bad
    logits_BV[3] = -torch.inf

    with pytest.raises(InvalidLogitsError, match=r"rows \[1, 3\]") as caught:
        Sampler().sample(logits_BV, [row(SamplingParams(temperature=temperature))] * 4)

    assert caught.value.rows == (1, 3)
    assert isinstance(caught.value, KVKeepError)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Greedy choice and distribution agree with RepetitionPenaltyLogitsProcessor."""
    logits_BV = random_logits(200, seed=9)
    # Positive and negative logits are penalised differently, so both must be among the best.
    logits_BV[::2] -= 12
    ids = torch.randint(0, VOCABULARY, (200, 12), generator=torch.Generator().manual_seed(2))
    expected_BV = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits_BV.clone())
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    rows = [row(params, line[:7].tolist(), line[7:].tolist()) for line in ids]

    tokens = [sampled.token_id for sampled in Sampler().sample(logits_BV, rows)]

    assert tokens == expected_BV.argmax(dim=-1).tolist()
    assert tokens != logits_BV.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, presence_penalty=1.9),
        SamplingParams(temperature=0, frequency_penalty=0.8),
        SamplingParams(temperature=0, frequency_penalty=0.9, presence_penalty=-1.9),
        SamplingParams(
            temperature=0, frequency_penalty=1.2, presence_penalty=-0.5, repetition_penalty=1.4
        ),
    ],
    ids=["presence", "frequency", "both", "all"],
)
def test_penalties_are_those_of_the_reference(params: SamplingParams) -> None:
    """Presence and frequency look at the output alone, repetition at the prompt too."""
    logits_BV = random_logits(300, seed=21) / 3
    best = logits_BV.topk(4, dim=-1).indices.tolist()
    # The most likely tokens are in prompt and output, or the penalties would decide nothing.
    rows = [row(params, ids[1:3], [ids[0], ids[0], ids[2], ids[3]]) for ids in best]
    expected = [
        max(range(VOCABULARY), key=reference_logits(logits_V.tolist(), state).__getitem__)
        for logits_V, state in zip(logits_BV, rows, strict=True)
    ]

    tokens = [sampled.token_id for sampled in Sampler().sample(logits_BV, rows)]

    assert tokens == expected
    assert tokens != logits_BV.argmax(dim=-1).tolist()


def test_prompt_ids_behind_the_vocabulary_are_ignored() -> None:
    """Placeholders of images have no logit, and no penalty."""
    state = row(SamplingParams(temperature=0, repetition_penalty=2.0), [3, 10**6], [2])

    assert Sampler().sample(torch.tensor([[0.0, 1.0, 5.0, 4.0]]), [state]) == [Sampled(2)]


def test_logprobs_come_from_the_unmodified_logits() -> None:
    """Penalties, temperature and truncation change the choice, not the reported numbers."""
    logits_BV = random_logits(12, seed=6)
    params = SamplingParams(
        seed=1, temperature=2.5, top_k=3, repetition_penalty=5.0, logprobs=5, frequency_penalty=2
    )
    expected_BV = logits_BV.log_softmax(dim=-1)
    rows = [row(params, [1, 2], logits_BV[b].topk(2).indices.tolist()) for b in range(12)]

    for b, sampled in enumerate(Sampler().sample(logits_BV, rows)):
        best = expected_BV[b].topk(5)
        assert sampled.logprob == pytest.approx(expected_BV[b, sampled.token_id].item(), abs=1e-5)
        assert [one.token_id for one in sampled.top] == best.indices.tolist()
        assert [one.logprob for one in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_reported_to_those_who_ask() -> None:
    """None reports nothing, 0 the chosen token, k the chosen token and k alternatives."""
    rows = [row(SamplingParams(temperature=0, logprobs=asked)) for asked in (None, 0, 2)]

    nothing, chosen, top = Sampler().sample(random_logits(3), rows)

    assert (nothing.logprob, nothing.top) == (None, ())
    assert chosen.logprob is not None
    assert chosen.top == ()
    assert top.top[0].token_id == top.token_id
    assert len(top.top) == 2


def test_equals_are_reported_in_order_of_id_and_forbidden_tokens_not_at_all() -> None:
    """The report is the same on every device, and holds no infinities that JSON cannot carry."""
    logits_BV = torch.tensor([[1.0, 2.0, -torch.inf, 2.0, 1.0]])

    (sampled,) = Sampler().sample(logits_BV, [row(SamplingParams(temperature=0, logprobs=20))])

    assert [one.token_id for one in sampled.top] == [1, 3, 0, 4]


def test_an_empty_batch_gives_nothing() -> None:
    """A step that ends no segment samples nothing."""
    assert Sampler().sample(torch.empty(0, VOCABULARY), []) == []


def test_noise_is_uniform_and_pinned() -> None:
    """The noise of a seed and a position is the same in every release and lies in [0, 1)."""
    state = row(SamplingParams(seed=123))
    noise = [
        row(SamplingParams(seed=seed), output_ids=[0] * length).uniform()
        for seed in range(100)
        for length in range(20)
    ]

    assert state.uniform() == 0.9859012973188279
    assert all(0 <= value < 1 for value in noise)
    assert len(set(noise)) == 2000
    assert sum(noise) / 2000 == pytest.approx(0.5, abs=0.03)
