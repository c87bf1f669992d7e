"""The workers that are alive: started when a heat needs them, checked once, ended when it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES
from benchmarks.peers.plan import Heat, Stage
from benchmarks.peers.prepare import Prepared
from benchmarks.peers.protocol import RefusalError, prompt_of
from benchmarks.peers.worker_process import Worker, WorkerError

__all__ = ["Agreement", "Crew", "Facts"]

# Prompts of the check, their tokens, and the tokens generated behind each.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 12, 24, 4
# With random weights and this vocabulary, engines that compute something else agree in next to nothing.
_LEAST_AGREEMENT = 0.5
_MOST_FAILURES = 2


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the tokens up to and including the first difference of each output, how many are equal."""

    num_equal: int
    num_compared: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.num_equal / self.num_compared

    @classmethod
    def of(cls, found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> "Agreement":
        """Compare outputs with those of the reference."""
        num_equal = num_compared = 0
        for row, other in zip(found, wanted, strict=True):
            for mine, yours in zip(row, other, strict=True):
                num_compared += 1
                if mine != yours:
                    break
                num_equal += 1
        return cls(num_equal, num_compared)


@dataclass(kw_only=True, slots=True)
class Facts:
    """What is known of an engine that was started."""

    versions: str
    precision: str
    fills: str
    vocabulary: int
    agreement: Agreement | None = None
    tokens_per_s: float | None = None


@dataclass(kw_only=True)
class Crew:
    """Every engine of a heat that could be started; why the others could not is in `reasons`."""

    prepared: Mapping[str, Prepared]
    threads: int
    logs: Path
    reasons: dict[str, str]
    facts: dict[str, Facts] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    reference: str | None = None
    _stage: Stage | None = None
    _wanted: list[list[int]] = field(default_factory=list)
    _num_failures: dict[str, int] = field(default_factory=dict)

    def man(self, heat: Heat) -> None:
        """Have the heat's engines alive, and no others."""
        is_same = self._stage == heat.stage
        for name in [name for name in self.workers if name not in heat.engines or not is_same]:
            self.workers.pop(name).close()
        self._stage = heat.stage
        # The reference is asked first.
        for name in sorted(heat.engines, key=lambda name: name != "transformers"):
            if name not in self.workers and self.may_start(name):
                self._start(name, heat.stage.tokens)

    def may_start(self, name: str) -> bool:
        """Whether the engine is there and has not failed too often."""
        return name in self.prepared and self._num_failures.get(name, 0) < _MOST_FAILURES

    def ask(self, name: str, op: str, **fields: Any) -> dict[str, Any]:
        """Ask a living worker. One that fails is ended, with its reason kept. Raises WorkerError."""
        worker = self.workers.get(name)
        if worker is None:
            raise WorkerError(self.reasons.get(name, "not running"))
        try:
            return worker.ask(op, **fields)
        except WorkerError as error:
            self._fail(name, str(error))
            raise

    def close(self) -> None:
        """End all workers."""
        while self.workers:
            self.workers.popitem()[1].close()

    def _start(self, name: str, capacity_tokens: int) -> None:
        print(f"starting {name}", flush=True)
        try:
            worker = Worker(
                ENGINES[name],
                self.prepared[name],
                threads=self.threads,
                capacity_tokens=capacity_tokens,
                log=self.logs / f"{name}.log",
            )
        except (WorkerError, RefusalError) as error:
            self._fail(name, f"does not start: {error}")
            return
        self.workers[name] = worker
        try:
            self._learn(name, worker.hello)
        except (WorkerError, RefusalError) as error:
            self._fail(name, f"cannot generate: {error}")

    def _learn(self, name: str, hello: Mapping[str, Any]) -> None:
        """What the engine says of itself, and whether it computes what the reference does."""
        prompts = [
            prompt_of(("check", at), _PROMPT_TOKENS, hello["vocabulary"]) for at in range(_PROMPTS)
        ]
        tokens = self.ask(name, "generate", prompts=prompts, num_tokens=_NEW_TOKENS)["tokens"]
        facts = self.facts.get(name)
        if facts is None:
            facts = self.facts[name] = Facts(**hello)
            facts.agreement = self._agreement(name, tokens)
        if facts.agreement is not None and facts.agreement.share < _LEAST_AGREEMENT:
            self._num_failures[name] = _MOST_FAILURES
            raise WorkerError(
                f"{facts.agreement.num_equal} of {facts.agreement.num_compared} tokens are those of "
                f"{self.reference}: it computes something else"
            )

    def _agreement(self, name: str, tokens: list[list[int]]) -> Agreement | None:
        if self.reference is None:
            self.reference, self._wanted = name, tokens
            return None
        return Agreement.of(tokens, self._wanted)

    def _fail(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        self._num_failures[name] = self._num_failures.get(name, 0) + 1
        worker = self.workers.pop(name, None)
        if worker is not None:
            worker.close()
        print(f"{name}: {reason}", flush=True)
