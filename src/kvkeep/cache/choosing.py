"""Load or compute: what of a request's stored blocks is worth loading, by costs measured on this machine.

Observes every step and every load, and asks kvkeep.planning what is quicker.
"""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from kvkeep.cache.decision import Decision
from kvkeep.cache.lookup import RequestPlan
from kvkeep.planning import (
    ComputeCost,
    ComputeFit,
    LoadCost,
    LoadFit,
    MissingBlock,
    PlannerRecord,
    PlannerStats,
    SplitKind,
    StoredBlock,
    TierLoad,
    choose_split,
)
from kvkeep.planning.calibration import Calibration
from kvkeep.spec import KVSpec, LayerKind, Span

__all__ = ["Chooser"]

# What a step of others' costs them while this one is computed: of a second, a second for each of them is too
# much, since they are computed in the same step.
_WEIGHT_OF_OTHERS = 0.5
_PROBED_BLOCKS = 2
# By so much a split must be better than loading or computing everything: predictions are off by a tenth, and
# a plan of two parts waits for the slower one.
_HYSTERESIS = 0.15
# Where nothing has been measured yet: about what memory and files of a small machine do.
_COMPUTE_GUESS = ComputeCost(fixed_s=1e-3, linear_s=1e-3, quadratic_s=1e-8)
_LOAD_GUESS = LoadCost(latency_s=1e-3, bytes_per_s=1e9)


class Chooser:
    """Decides with costs fitted online; for the thread that owns the books.

    `step_tokens` are the most that one step computes.
    """

    def __init__(
        self,
        spec: KVSpec,
        tiers: Sequence[str],
        *,
        step_tokens: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._spec = spec
        self._tiers = tiers
        self._step_tokens = step_tokens
        self.start_from(Calibration(compute=_COMPUTE_GUESS))
        self._clock = clock
        self._record = PlannerRecord()

    def start_from(self, calibration: Calibration) -> None:
        """Take these costs for what is true until there is more to learn from."""
        self._compute = ComputeFit(calibration.compute)
        self._loads = {
            name: LoadFit(calibration.loads.get(name, _LOAD_GUESS)) for name in self._tiers
        }

    @property
    def calibration(self) -> Calibration:
        """What has been learnt."""
        loads = {name: fit.cost for name, fit in self._loads.items() if fit.num_observed}
        return Calibration(compute=self._compute.cost, loads=loads)

    @property
    def compute(self) -> ComputeFit:
        """What computing costs; it is to be told of every step."""
        return self._compute

    @property
    def stats(self) -> PlannerStats:
        """Decisions, and how they turned out."""
        return self._record.stats

    def choose(
        self,
        num_tokens: int,
        request: RequestPlan,
        object_bytes: Sequence[int],
        queued_bytes: Mapping[str, int],
        *,
        num_others: int,
    ) -> Decision | None:
        """What to load of `request`; None where nothing of it is stored.

        `object_bytes` are those of a stored block of each group, `queued_bytes` what is under way by tier.
        """
        blocks = self._missing(num_tokens, request, object_bytes)
        if not any(block.tiers for block in blocks):
            return None
        loads = {
            name: TierLoad(fit.cost, queued_bytes.get(name, 0)) for name, fit in self._loads.items()
        }
        split = choose_split(
            blocks,
            self._compute.cost,
            loads,
            step_tokens=self._step_tokens,
            others_weight=_WEIGHT_OF_OTHERS if num_others else 0.0,
            hysteresis=_HYSTERESIS,
        )
        size = self._spec.block_size
        stored = [block for block in blocks if block.tiers]
        computed = {
            block.span.start // size
            for block, source in zip(blocks, split.sources, strict=True)
            if block.tiers and source is None
        }
        if split.kind is SplitKind.SPLIT and not self._can_split:
            # What windows and states need of one another is not in the costs: all or nothing.
            is_computed = split.all_compute_s < split.all_load_s
            computed = {block.span.start // size for block in stored} if is_computed else set()
        elif self._can_split and len(computed) == len(stored):
            computed -= self._probe(stored, loads, split.compute_s)
        self._record.decide(split)
        return Decision(split, self._clock(), frozenset(computed))

    def observe_load(self, tier: str, num_bytes: int, seconds: float, queued_bytes: int) -> None:
        """A load has come, so long after it was asked for behind so many bytes."""
        self._loads[tier].observe(num_bytes, seconds, queued_bytes)

    def finish(self, decision: Decision) -> None:
        """All blocks of the plan are there."""
        self._record.finish(decision.split, self._clock() - decision.began_s)

    def _probe(
        self, stored: Sequence[MissingBlock], loads: Mapping[str, TierLoad], compute_s: float
    ) -> set[int]:
        """The last few blocks, if they come while the rest is computed: so a tier that got faster shows."""
        last = stored[-_PROBED_BLOCKS:]
        load_s = sum(loads[block.tiers[0]].seconds(block.num_bytes) for block in last)
        if load_s > compute_s * (1 - len(last) / max(1, len(stored))):
            return set()
        return {block.span.start // self._spec.block_size for block in last}

    @property
    def _can_split(self) -> bool:
        return all(group.kind is LayerKind.FULL for group in self._spec.groups)

    def _missing(
        self, num_tokens: int, request: RequestPlan, object_bytes: Sequence[int]
    ) -> list[MissingBlock]:
        """All that is not on the device, in order: stored blocks, and the gaps between them."""
        size = self._spec.block_size
        stored: dict[int, MissingBlock] = {}
        for group, known in enumerate(request.group_blocks):
            for number in request.coverage.loads(group, known.blocks, size):
                source = known.blocks[number]
                assert isinstance(source, StoredBlock)
                # Of the last block the end may be a gap: its last token is computed for its logits.
                starts = [gap.start for gap in request.coverage.gaps if gap.start > number * size]
                span = Span(number * size, min([num_tokens, (number + 1) * size, *starts]))
                num_bytes = object_bytes[group] + (
                    stored[number].num_bytes if number in stored else 0
                )
                stored[number] = MissingBlock(span, num_bytes, (source.source,))
        gaps = [MissingBlock(gap) for gap in request.coverage.gaps]
        return sorted([*stored.values(), *gaps], key=lambda block: block.span.start)
