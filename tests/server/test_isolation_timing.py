"""What a tenant learns from the clock: whether it has sent a prompt itself, and not whether another has."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from secrets import token_hex
from time import perf_counter

import pytest

from tests.running_server import RunningServer, running_server

ANNA, BERT = "key-of-anna", "key-of-bert"
_NUM_PAIRS = 14
_NUM_WORDS = 300
# Of pairs without any difference so many are taken for different; those that are get a second look.
_FALSE_ALARMS = 0.001
_WORDS = [
    "harbour",
    "ferry",
    "lamp",
    "sensor",
    "museum",
    "cellar",
    "river",
    "order",
    "parcel",
    "garden",
]


@dataclass(frozen=True, slots=True)
class Asked:
    """Seconds to the first token, pair by pair: of prompts in question, and of prompts that nobody sent."""

    first_s: list[float]
    fresh_s: list[float]

    def probability(self) -> float:
        """How likely ranks as uneven as these are where there is no difference, in either direction."""
        pairs = zip(self.first_s, self.fresh_s, strict=True)
        return signed_rank_probability([first - fresh for first, fresh in pairs])

    def looks_different(self) -> bool:
        """Whether they can be told apart."""
        return self.probability() < _FALSE_ALARMS


def signed_rank_probability(differences: Sequence[float]) -> float:
    """Wilcoxon's signed-rank test, two-sided and exact: every pattern of signs is equally likely."""
    by_size = sorted(differences, key=abs)
    total = len(by_size) * (len(by_size) + 1) // 2
    positive = sum(rank for rank, one in enumerate(by_size, 1) if one > 0)
    sum_to_count = [1] + [0] * total
    for rank in range(1, len(by_size) + 1):
        for at in range(total, rank - 1, -1):
            sum_to_count[at] += sum_to_count[at - rank]
    least = min(positive, total - positive)
    return min(1.0, 2 * sum(sum_to_count[: least + 1]) / 2.0 ** len(by_size))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants."""
    with running_server(api_keys=(ANNA, BERT), llm_options={"capacity": "256MB"}) as running:
        yield running


def fresh_prompt() -> str:
    """A long text that begins as no other does."""
    return f"Tale {token_hex(8)}. " + " ".join(random.choices(_WORDS, k=_NUM_WORDS))


def first_token_s(server: RunningServer, key: str, prompt: str) -> float:
    """Seconds from the request to the first token of its stream."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    with server.client(key) as client:
        client.get("/health")  # the connection is there before the clock starts
        began_s = perf_counter()
        with client.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    found_s = perf_counter() - began_s
                    assert json.loads(line[6:])["choices"], line
                    return found_s
    raise AssertionError("the stream has ended without a token")


def asked_by(server: RunningServer, key: str) -> Asked:
    """Anna sends prompts; `key` asks for each of them, and for one that nobody sent, who takes turns."""
    asked = Asked([], [])
    for number in range(_NUM_PAIRS):
        sent, unsent = fresh_prompt(), fresh_prompt()
        first_token_s(server, ANNA, sent)
        questions: list[tuple[list[float], str]] = [(asked.first_s, sent), (asked.fresh_s, unsent)]
        for seconds, prompt in reversed(questions) if number % 2 else questions:
            seconds.append(first_token_s(server, key, prompt))
    return asked


def test_the_rank_test_has_the_false_alarms_that_it_says() -> None:
    """Of pairs that differ by chance alone one in twenty has a probability of at most 0.05."""
    chance = random.Random(5)
    found = [
        signed_rank_probability([chance.gauss(0, 1) for _ in range(_NUM_PAIRS)])
        for _ in range(2000)
    ]

    assert 0.03 < sum(one <= 0.05 for one in found) / len(found) < 0.07
    assert signed_rank_probability([-1.0 - at for at in range(_NUM_PAIRS)]) < _FALSE_ALARMS


def test_a_tenant_sees_by_the_clock_what_it_sent_itself(server: RunningServer) -> None:
    """The positive control: what can be seen is seen, every time, in one sample."""
    asked = asked_by(server, ANNA)

    assert asked.looks_different(), asked
    assert sorted(asked.first_s)[_NUM_PAIRS // 2] < sorted(asked.fresh_s)[_NUM_PAIRS // 2]


def test_a_tenant_cannot_see_by_the_clock_what_another_sent(server: RunningServer) -> None:
    """Bert's prompts take as long when Anna has sent them as when nobody has."""
    first = asked_by(server, BERT)

    assert not first.looks_different() or not asked_by(server, BERT).looks_different(), first


def test_tenants_that_share_do_see_it() -> None:
    """Where keys are not isolated the same measurement shows what another has sent."""
    with running_server(
        api_keys=(ANNA, BERT), isolate_keys=False, llm_options={"capacity": "256MB"}
    ) as sharing:
        assert asked_by(sharing, BERT).looks_different()
