"""Load or compute: for the missing blocks of a request the cheaper of the two, or both from two ends.

What is computed needs everything in front of it, what is loaded needs nothing: so the front is computed while
what lies behind is loaded, and they meet in the middle (Cake, arXiv:2410.03065). Tiers are servers of their
own; blocks of a tier that is near in time may be loaded among the front. For a step of its own, and so for
what nobody has behind the middle, all loads are waited for:

    time = max(front, loads) + rest

All middles are tried, with every choice of near and of usable tiers; sums over blocks make that cheap.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

from kvkeep.planning.cost import ComputeCost
from kvkeep.planning.split_plan import MissingBlock, SplitKind, SplitPlan, TierLoad, join_runs
from kvkeep.planning.split_search import Candidate, SplitSearch

__all__ = ["HYSTERESIS", "MOST_SLOWDOWN", "choose_split"]

# By so much a split must be better than a simple plan: predictions are no better than that.
HYSTERESIS = 0.05
# However busy others are, no plan takes longer than so many times the better of the two simple ones.
MOST_SLOWDOWN = 1.1


def choose_split(
    blocks: Sequence[MissingBlock],
    compute: ComputeCost,
    loads: Mapping[str, TierLoad],
    *,
    step_tokens: int,
    others_weight: float = 0.0,
    hysteresis: float = HYSTERESIS,
) -> SplitPlan:
    """Decide for the missing blocks of one request, which are in order of position. Pure.

    `step_tokens` are the most that one step computes; `others_weight` is what a second of computing costs
    others who wait for the device, in seconds. Tiers that `loads` does not name are not used.
    """
    assert step_tokens > 0
    assert all(a.span.stop <= b.span.start for a, b in pairwise(blocks))
    search = SplitSearch(
        blocks, compute, loads, step_tokens=step_tokens, others_weight=others_weight
    )
    all_load, all_compute = search.load_everything(), search.compute_everything()
    limit_s = MOST_SLOWDOWN * min(all_load.seconds, all_compute.seconds)
    simple = [way for way in (all_load, all_compute) if way.seconds <= limit_s]
    chosen = min(simple, key=lambda way: way.objective)
    best = _best_split(search, limit_s)
    if best is not None and best.objective * (1 + hysteresis) < chosen.objective:
        chosen = best
    sources = search.sources(chosen)
    return SplitPlan(
        kind=_kind(sources, search.num_loadable),
        sources=sources,
        runs=join_runs(blocks, sources),
        seconds=chosen.seconds,
        compute_s=chosen.compute_s,
        load_s=chosen.load_s,
        all_load_s=all_load.seconds,
        all_compute_s=all_compute.seconds,
    )


def _best_split(search: SplitSearch, limit_s: float) -> Candidate | None:
    ways = [
        search.best(near=near, usable=usable, limit_s=limit_s)
        for near, usable in product(search.choices, repeat=2)
    ]
    return min((way for way in ways if way), key=lambda way: way.objective, default=None)


def _kind(sources: Sequence[str | None], num_loadable: int) -> SplitKind:
    num_loaded = len(sources) - sources.count(None)
    if not num_loaded:
        return SplitKind.COMPUTE
    return SplitKind.LOAD if num_loaded == num_loadable else SplitKind.SPLIT
