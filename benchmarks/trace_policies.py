"""Eviction policies on traces of requests, beside a cache that knows the future. No model and no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import perf_counter

from benchmarks.harness import Run, Script
from kvkeep.replay import (
    WORKLOADS,
    Comparison,
    ReplayReport,
    ReplaySettings,
    ReplayTier,
    generate,
    parse_tier,
    read_trace,
    visits_of,
)
from kvkeep.replay.trace import BLOCK_TOKENS

_POLICIES = ("lru", "slru", "gdsf", "s3fifo")
# An 8B model of 8 key heads in two bytes; only rates would change with another number.
_BYTES_PER_TOKEN = 131_072
_BLOCK_BYTES = _BYTES_PER_TOKEN * BLOCK_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes are shares of all blocks of a trace, outputs included; `device` is the one above a tier.

    `trace` is a file in the format of the public traces, left out where it is absent (docs/traces.md).
    """

    trace: str
    requests: int
    seeds: int
    shares: tuple[float, ...]
    device: float
    tier_shares: tuple[float, ...]
    rounds: int
    at_least_per_s: float | None


@dataclass(frozen=True, slots=True)
class _Trace:
    """A trace of a workload, ready to be replayed."""

    name: str
    comparison: Comparison
    num_blocks: int
    most_places: int

    def blocks(self, share: float) -> int:
        """Blocks of a place of this share; the longest request always fits."""
        return max(self.most_places, round(share * self.num_blocks))


@dataclass(slots=True)
class _Tables:
    """Values by what they are of, in the order in which they came, one for each trace of a workload."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, what: str, unit: str, value: float) -> None:
        """One more value."""
        self.values.setdefault((what, unit), []).append(value)


def measure(run: Run, settings: Settings) -> None:
    """All policies on the device, then below it, then the speed."""
    start, tables, num_runs = perf_counter(), _Tables(), 0
    for trace in _traces(run, settings):
        _check_unbounded(run, trace)
        for report in _replays(trace, settings, tables):
            num_runs += 1
            assert report.passed.hits <= report.optimum.hits <= report.ideal_hits
            assert report.optimum.prefix_hits == report.optimum.hits
        if perf_counter() - start > run.budget_s:
            run.notes.append(f"the budget was spent behind {trace.name}")
            break
    run.check(
        "no replay finds more than the optimum of its size", holds=num_runs > 0, found=num_runs
    )
    for (what, unit), values in tables.values.items():
        run.add(what, values, unit)
    _measure_speed(run, settings)
    run.notes += [
        "of best: blocks found over those that a clairvoyant cache of the same room finds",
        "one value for each trace of a workload: the public one once, the generated ones with several seeds",
    ]


def _replays(trace: _Trace, settings: Settings, tables: _Tables) -> Iterator[ReplayReport]:
    for share in settings.shares:
        for policy in _POLICIES:
            report = trace.comparison.replay(_under(trace.blocks(share), policy))
            where = f"{trace.name}, device of {share:.0%}, {policy}"
            tables.add(where, "of best", report.share_of_optimum)
            tables.add(f"{where}: prefixes", "of best", report.prefix_share_of_optimum)
            tables.add(f"policy time, {policy}", "us a look-up", _policy_us(report))
            yield report
    for share in settings.tier_shares:
        for policy in _POLICIES:
            host = ReplayTier(
                name="host", capacity_bytes=trace.blocks(share) * _BLOCK_BYTES, policy=policy
            )
            report = trace.comparison.replay(_under(trace.blocks(settings.device), "lru", host))
            where = f"{trace.name}, host of {share:.0%} below {settings.device:.0%}, {policy}"
            tables.add(where, "of best", report.share_of_optimum)
            yield report


def _under(num_blocks: int, policy: str, *tiers: ReplayTier) -> ReplaySettings:
    return ReplaySettings(
        capacity_bytes=num_blocks * _BLOCK_BYTES,
        bytes_per_token=_BYTES_PER_TOKEN,
        policy=policy,
        tiers=tiers,
    )


def _policy_us(report: ReplayReport) -> float:
    return report.policy_s / report.passed.num_lookups * 1e6


def _traces(run: Run, settings: Settings) -> Iterator[_Trace]:
    path = Path(settings.trace)
    if path.is_file():
        digest = sha256(path.read_bytes()).hexdigest()
        run.notes.append(f"public: {path.name}, sha256 {digest}")
        yield _trace("public", path, settings, run.seed)
    else:
        run.notes.append(f"public: left out, trace={settings.trace!r} is no file")
    for seed in range(run.seed, run.seed + settings.seeds):
        for name in WORKLOADS:
            yield _trace(name, None, settings, seed)


def _trace(name: str, path: Path | None, settings: Settings, seed: int) -> _Trace:
    if path is not None:
        requests = read_trace(path)
    else:
        requests = generate(WORKLOADS[name], num_requests=settings.requests, seed=seed)
    visits = visits_of(requests, BLOCK_TOKENS)
    return _Trace(
        name=name,
        comparison=Comparison(visits),
        num_blocks=len({entry.key for visit in visits for entry in visit.entries}),
        most_places=max(visit.num_places for visit in visits),
    )


def _check_unbounded(run: Run, trace: _Trace) -> None:
    report = trace.comparison.replay(_under(trace.num_blocks + trace.most_places, "lru"))
    found = f"({report.passed.hits} of {report.passed.num_lookups} blocks)"
    run.check(
        f"{trace.name}: a device that holds everything finds what was there before",
        holds=report.passed.hits == report.ideal_hits,
        found=found,
    )


def _measure_speed(run: Run, settings: Settings) -> None:
    """Look-ups in a second, with everything that follows from them, of a device alone and of three places."""
    path = Path(settings.trace)
    trace = _trace(
        "public" if path.is_file() else "chat", path if path.is_file() else None, settings, run.seed
    )
    size = trace.blocks(0.1) * _BLOCK_BYTES
    host, disk = parse_tier(f"host:{size}"), parse_tier(f"disk:{3 * size}")
    places = {"a device": (), "device and host": (host,), "device, host and disk": (host, disk)}
    for what, tiers in places.items():
        under = _under(trace.blocks(settings.device), "lru", *tiers)
        rates = [trace.comparison.replay(under).lookups_per_s for _ in range(settings.rounds)]
        run.add(
            f"look-ups of {what}, {trace.name} trace",
            rates,
            "1/s",
            at_least=settings.at_least_per_s,
        )


main = Script(
    name="trace_policies",
    claim="A replay makes at least 50,000 block look-ups a second, and says which policy finds most.",
    full=Settings(
        trace="conversation_trace.jsonl",
        requests=4000,
        seeds=2,
        shares=(0.02, 0.05, 0.1, 0.3),
        device=0.02,
        tier_shares=(0.05, 0.2),
        rounds=5,
        at_least_per_s=50_000.0,
    ),
    quick=Settings(
        trace="",
        requests=150,
        seeds=1,
        shares=(0.1, 0.3),
        device=0.1,
        tier_shares=(0.3,),
        rounds=3,
        at_least_per_s=None,
    ),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
