"""What the comparison and a worker say to each other: one JSON object a line, over stdin and stdout.

Workers run in environments that have neither kvkeep nor its dependencies: this file imports Python only.
"""

import argparse
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TextIO

__all__ = [
    "EITHER",
    "ONE",
    "OWN",
    "Engine",
    "Filled",
    "Opening",
    "Options",
    "RefusalError",
    "prompt_of",
    "serve",
    "sharing_within",
]

Message = dict[str, Any]

# What an opening says of contexts: each request has its own; or all have one; or as time allows.
OWN, ONE, EITHER = "own", "one", "either"


class RefusalError(Exception):
    """The engine cannot be measured here; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a worker is started: `kv` is the K/V format in the engine's words, "" for its default."""

    model: Path
    threads: int
    capacity_tokens: int
    kv: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """`batch` requests, each behind `context` tokens that are known before the first step.

    Where the engine computes them, contexts of their own may take `limit_s` seconds in all, and a single one
    `most_s`. `sharing` is one of OWN, ONE, EITHER.
    """

    batch: int
    context: int
    seed: int
    limit_s: float
    most_s: float
    sharing: str

    def prompts(self, vocabulary: int, *, is_shared: bool) -> list[list[int]]:
        """For each request its context, and one token more that the first step computes."""
        return [
            [
                *prompt_of((self.seed, 0 if is_shared else row), self.context, vocabulary),
                *prompt_of((self.seed, "last", row), 1, vocabulary),
            ]
            for row in range(self.batch)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """How the contexts came to be known; `is_shared` when all requests read the same K/V.

    `kv_bytes` is what the K/V of the requests take, padding included.
    """

    how: str
    is_shared: bool
    kv_bytes: int


class Engine(Protocol):
    """What a worker does for the comparison. One opening at a time."""

    vocabulary: int

    def describe(self) -> dict[str, str]:
        """`versions`, `precision`, and `fills`: "random" or "prefill"."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The most likely tokens behind each prompt, one after the other."""
        ...

    def open(self, opening: Opening) -> Filled:
        """Begin requests and take one step of each. Raises RefusalError."""
        ...

    def step(self) -> None:
        """Compute one token of every request of the opening."""
        ...

    def close(self) -> None:
        """End the requests of the opening and forget their K/V."""
        ...

    def warm(self, prefix: Sequence[int]) -> str:
        """Have the K/V of a prefix ready for `first_token`; says how."""
        ...

    def first_token(self, prompt: Sequence[int]) -> None:
        """Compute the first token behind a prompt, whose beginning may be the warm prefix."""
        ...


def prompt_of(seed: object, num_tokens: int, vocabulary: int) -> list[int]:
    """Random token ids, the same in every process."""
    return random.Random(repr(seed)).choices(range(vocabulary), k=num_tokens)


def sharing_within(opening: Opening, tokens_per_s: float) -> bool:
    """Whether the requests must share one context to be filled in time, for an engine that computes it.

    Raises RefusalError when not even one context can be filled in time.
    """
    one_s = opening.context / tokens_per_s
    all_s = one_s * opening.batch
    if opening.batch > 1 and opening.sharing != ONE and all_s <= opening.limit_s:
        return False
    if opening.batch > 1 and opening.sharing == OWN:
        raise RefusalError(f"filling would take {all_s:.0f} s, {opening.limit_s:.0f} s were given")
    if one_s > opening.most_s:
        raise RefusalError(
            f"filling one context would take {one_s:.0f} s, {opening.most_s:.0f} s were given"
        )
    return opening.batch > 1


def resident_bytes() -> int | None:
    """Memory of this process that is no file's; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def serve(make: Callable[[Options], Engine]) -> None:
    """Make an engine and answer until the input ends."""
    # What the engine prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    made: list[Engine] = []

    def start() -> Message:
        engine = make(_options())
        made.append(engine)
        return engine.describe() | {"vocabulary": engine.vocabulary}

    _answer(answers, start)
    for engine in made:
        for line in sys.stdin:
            _answer(answers, partial(_perform, engine, json.loads(line)))


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--capacity-tokens", type=int, required=True)
    parser.add_argument("--kv", default="")
    return Options(**vars(parser.parse_args()))


def _answer(answers: TextIO, work: Callable[[], Message]) -> None:
    try:
        answer = work()
    except RefusalError as refusal:
        answer = {"refused": str(refusal)}
    except Exception as error:  # noqa: BLE001  what an engine may raise is not known here
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _perform(engine: Engine, message: Message) -> Message:
    match message.pop("op"):
        case "generate":
            return {"tokens": engine.generate(message["prompts"], message["num_tokens"])}
        case "open":
            filled = engine.open(Opening(**message))
            return asdict(filled) | {"resident_bytes": resident_bytes()}
        case "step":
            return {"seconds": _seconds(engine.step)}
        case "close":
            engine.close()
            return {}
        case "warm":
            return {"how": engine.warm(_prompt(engine, message))}
        case "first_token":
            prompt = _prompt(engine, message)
            return {"seconds": _seconds(lambda: engine.first_token(prompt))}
        case unknown:
            raise ValueError(f"op={unknown!r} is unknown")


def _prompt(engine: Engine, message: Message) -> list[int]:
    """The parts of a prompt, `[[seed, number of tokens], ...]`, as one."""
    parts = [prompt_of(seed, count, engine.vocabulary) for seed, count in message["parts"]]
    return [token for part in parts for token in part]


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
