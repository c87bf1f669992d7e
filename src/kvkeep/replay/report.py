"""A pass beside what could have been: an unbounded cache, and the best one of the same size."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvkeep.replay.belady import Clairvoyant, Optimum, ideal_hits
from kvkeep.replay.replay import Passed, PassedLevel, Replay
from kvkeep.replay.settings import ReplaySettings
from kvkeep.replay.visits import Visit

__all__ = ["Comparison", "ReplayReport", "report_json"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """What one device and its tiers made of a trace.

    Only requests that fit on the device count, for the others sides too; `num_refused` do not.
    `lookup_tokens` are the input tokens of those that count, full blocks or not. `ideal_hits` are those of a
    cache without bound, `optimum` of one that knows the future and has the room of device and tiers
    together.
    """

    settings: ReplaySettings
    num_requests: int
    num_refused: int
    lookup_tokens: int
    passed: Passed
    ideal_hits: int
    optimum: Optimum

    @property
    def levels(self) -> tuple[PassedLevel, ...]:
        """Device and tiers, nearest first."""
        return self.passed.levels

    def block_rate(self, hits: int) -> float:
        """`hits` as a share of the full input blocks."""
        return hits / self.passed.num_lookups if self.passed.num_lookups else 0.0

    def token_rate(self, hits: int) -> float:
        """The tokens of `hits` blocks as a share of all input tokens."""
        return hits * self.settings.block_tokens / self.lookup_tokens if self.lookup_tokens else 0.0

    @property
    def share_of_ideal(self) -> float:
        """Hits over those of a cache without bound."""
        return self.passed.hits / self.ideal_hits if self.ideal_hits else 1.0

    @property
    def share_of_optimum(self) -> float:
        """Hits over the most that any cache of this size can have."""
        return self.passed.hits / self.optimum.hits if self.optimum.hits else 1.0

    @property
    def prefix_share_of_optimum(self) -> float:
        """The same where only contiguous prefixes count, on both sides."""
        best = self.optimum.prefix_hits
        return self.passed.prefix_hits / best if best else 1.0

    @property
    def policy_s(self) -> float:
        """Seconds in the policies of all levels."""
        return sum(level.policy_s for level in self.levels)

    @property
    def lookups_per_s(self) -> float:
        """Input blocks looked up, with all that follows from it, in a second of one thread."""
        return self.passed.num_lookups / self.passed.took_s if self.passed.took_s else 0.0


class Comparison:
    """Replays of one trace; what they are compared with is computed once for each size."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._visits = visits
        self._longest = max((visit.num_places for visit in visits), default=1)
        names = {entry.key for visit in visits for entry in visit.entries}
        # On so many places nothing is ever evicted.
        self._enough_places = max(1, len(names) + self._longest)
        self._most_to_clairvoyant: dict[int, Clairvoyant] = {}
        self._optima: dict[tuple[int, int], Optimum] = {}

    def replay(self, settings: ReplaySettings) -> ReplayReport:
        """Replay what fits on the device of `settings`."""
        most = min(self._longest, settings.num_blocks)
        served = self._visits
        if most < self._longest:
            served = [visit for visit in self._visits if visit.num_places <= most]
        return ReplayReport(
            settings=settings,
            num_requests=len(served),
            num_refused=len(self._visits) - len(served),
            lookup_tokens=sum(visit.input_tokens for visit in served),
            passed=Replay(settings, self._enough_places).run(served),
            ideal_hits=ideal_hits([visit.keys for visit in served]),
            optimum=self._optimum(served, most, settings.total_blocks),
        )

    def _optimum(self, served: Sequence[Visit], most: int, num_blocks: int) -> Optimum:
        """The optimum on requests of at most `most` places, which `served` are."""
        if most not in self._most_to_clairvoyant:
            self._most_to_clairvoyant[most] = Clairvoyant([visit.keys for visit in served])
        if (most, num_blocks) not in self._optima:
            self._optima[most, num_blocks] = self._most_to_clairvoyant[most].hits(num_blocks)
        return self._optima[most, num_blocks]


def report_json(report: ReplayReport) -> dict[str, Any]:
    """A report as plain values; rates are shares, sizes bytes, times seconds."""
    shares: dict[str, Callable[[int], float]] = {
        "block_hit_rate": report.block_rate,
        "token_hit_rate": report.token_rate,
    }
    levels = [
        asdict(level) | {name: share(level.hits) for name, share in shares.items()}
        for level in report.levels
    ]
    settings = asdict(report.settings)
    for tier in settings["tiers"]:
        tier["write_on"] = sorted(tier["write_on"])
    passed = report.passed
    return {
        "settings": settings,
        "num_requests": report.num_requests,
        "num_refused": report.num_refused,
        "num_lookups": passed.num_lookups,
        "lookup_tokens": report.lookup_tokens,
        "hits": passed.hits,
        "prefix_hits": passed.prefix_hits,
        **{name: share(passed.hits) for name, share in shares.items()},
        "ideal_hits": report.ideal_hits,
        "share_of_ideal": report.share_of_ideal,
        "optimum_hits": report.optimum.hits,
        "share_of_optimum": report.share_of_optimum,
        "optimum_prefix_hits": report.optimum.prefix_hits,
        "prefix_share_of_optimum": report.prefix_share_of_optimum,
        "levels": levels,
        "policy_s": report.policy_s,
        "took_s": passed.took_s,
        "lookups_per_s": report.lookups_per_s,
    }
