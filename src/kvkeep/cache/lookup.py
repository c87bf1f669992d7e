"""What the ledgers know of a request: a question that changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.blocks import BlockLedger, TokenChain
from kvkeep.planning import CoveragePlan, GroupBlocks, PartialHit, plan_coverage
from kvkeep.spec import KVSpec

__all__ = ["RequestPlan", "plan_request"]


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The gaps of a request and the blocks that each group knows of it."""

    coverage: CoveragePlan
    group_blocks: list[GroupBlocks]


def plan_request(
    spec: KVSpec, ledgers: Sequence[BlockLedger], chain: TokenChain, *, read: bool
) -> RequestPlan:
    """What to share and what to compute for `chain`; with `read=False` nothing is known."""
    num_full = len(chain) // spec.block_size
    keys = chain.keys[:num_full]
    contents = chain.block_content(0, num_full) if read else []
    groups = [
        GroupBlocks(ledger.spec, ledger.find(keys, contents) if read else [None] * num_full)
        for ledger in ledgers
    ]
    partial = _find_partial(chain, ledgers, groups) if read and not spec.is_recurrent else None
    return RequestPlan(plan_coverage(len(chain), spec.block_size, groups, partial), groups)


def _find_partial(
    chain: TokenChain, ledgers: Sequence[BlockLedger], groups: Sequence[GroupBlocks]
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
    if match is None:
        return None
    blocks = [ledger.get(match.key) for ledger in ledgers]
    known = tuple(block for block in blocks if block is not None)
    return PartialHit(number, match.num_tokens, known) if len(known) == len(blocks) else None
