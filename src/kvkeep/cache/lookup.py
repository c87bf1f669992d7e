"""What the ledgers know of a request: a question that changes nothing."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kvkeep.blocks import BlockLedger, TokenChain
from kvkeep.cache.decision import Decision
from kvkeep.planning import (
    CoveragePlan,
    GroupBlocks,
    Known,
    PartialHit,
    StoredBlock,
    plan_coverage,
)
from kvkeep.spec import BlockKey, KVSpec

__all__ = ["FindBelow", "FindDead", "RequestPlan", "plan_request", "without_loads"]


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The gaps of a request, the blocks that each group knows of it, and why some of these are computed."""

    coverage: CoveragePlan
    group_blocks: list[GroupBlocks]
    decision: Decision | None = None


# Which of a group's keys lie in some tier.
FindBelow = Callable[[int, Sequence[BlockKey]], Mapping[BlockKey, StoredBlock]]
# Which keys have expired.
FindDead = Callable[[Sequence[BlockKey]], Collection[BlockKey]]


def plan_request(
    spec: KVSpec,
    ledgers: Sequence[BlockLedger],
    chain: TokenChain,
    *,
    read: bool,
    find_dead: FindDead,
    find_below: FindBelow | None = None,
) -> RequestPlan:
    """What to share, to load and to compute for `chain`; with `read=False` nothing is known.

    What has expired is not known either, wherever it still lies.
    """
    num_full = len(chain) // spec.block_size
    keys = chain.keys[:num_full]
    contents = chain.block_content(0, num_full) if read else []
    dead = find_dead(keys) if read else ()
    groups = []
    for at, ledger in enumerate(ledgers):
        known: list[Known] = [None] * num_full
        if read:
            known = list(ledger.find(keys, contents))
        if read and find_below is not None:
            _add_stored(known, keys, partial(find_below, at))
        if dead:
            known = [None if key in dead else one for key, one in zip(keys, known, strict=True)]
        groups.append(GroupBlocks(ledger.spec, known))
    hit = None
    if read and not spec.is_recurrent:
        hit = _find_partial(chain, ledgers, groups, find_dead)
    return RequestPlan(plan_coverage(len(chain), spec.block_size, groups, hit), groups)


def without_loads(
    spec: KVSpec, num_tokens: int, request: RequestPlan, numbers: Collection[int]
) -> RequestPlan:
    """The same with stored blocks of these numbers computed instead of loaded."""
    groups = [
        GroupBlocks(
            group.spec,
            [
                None if at in numbers and isinstance(block, StoredBlock) else block
                for at, block in enumerate(group.blocks)
            ],
        )
        for group in request.group_blocks
    ]
    return RequestPlan(plan_coverage(num_tokens, spec.block_size, groups, None), groups)


def _add_stored(
    known: list[Known],
    keys: Sequence[BlockKey],
    find: Callable[[Sequence[BlockKey]], Mapping[BlockKey, StoredBlock]],
) -> None:
    """Fill the holes of `known` with what lies below."""
    holes = [at for at, block in enumerate(known) if block is None]
    if holes:
        found = find([keys[at] for at in holes])
        for at in holes:
            known[at] = found.get(keys[at])


def _find_partial(
    chain: TokenChain,
    ledgers: Sequence[BlockLedger],
    groups: Sequence[GroupBlocks],
    find_dead: FindDead,
) -> PartialHit | None:
    """A known block that begins like the first block behind everything known."""
    backwards = zip(*(reversed(group.blocks) for group in groups), strict=True)
    num_unknown = next((at for at, blocks in enumerate(backwards) if None not in blocks), None)
    number = 0 if num_unknown is None else len(groups[0].blocks) - num_unknown
    start = number * chain.block_size
    tokens = chain.packed(start, start + chain.block_size)
    if not tokens:
        return None
    match = ledgers[0].find_partial(chain.parent_key(number), tokens)
    if match is None or find_dead([match.key]):
        return None
    blocks = [ledger.get(match.key) for ledger in ledgers]
    known = tuple(block for block in blocks if block is not None)
    return PartialHit(number, match.num_tokens, known) if len(known) == len(blocks) else None
