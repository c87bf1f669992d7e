"""Whether the books are true: what leases hold against what the ledgers count and name."""

from collections.abc import Collection, Sequence

from kvkeep.blocks import BlockLedger
from kvkeep.cache.lease import Lease
from kvkeep.spec import BlockId, LayerKind

__all__ = ["find_problems"]


def find_problems(
    ledgers: Sequence[BlockLedger],
    leases: Collection[Lease],
    holds: Collection[tuple[int, BlockId]] = (),
) -> list[str]:
    """What is wrong, in words; empty when every invariant holds. Changes nothing.

    `holds` are the groups and places that loads hold.
    """
    problems: list[str] = []
    for group, ledger in enumerate(ledgers):
        holders = [0] * ledger.pool.num_blocks
        for at, block in holds:
            holders[block] += at == group
        for lease in leases:
            state = lease.states.get(group)
            for block in [*lease.tables[group].held(), *([] if state is None else [state])]:
                holders[block] += 1
            problems += _check_lease(lease, group, ledger)
        problems += ledger.check(holders)
    return problems


def _check_lease(lease: Lease, group: int, ledger: BlockLedger) -> list[str]:
    """Every block with a name has the name of the tokens for which the request holds it."""
    problems: list[str] = []
    table, keys, size = lease.tables[group], lease.chain.keys, lease.chain.block_size
    pending: set[int] = set()
    for gap in lease.gaps:
        pending.update(range(gap.start // size, -(-gap.stop // size)))
    for number, block in enumerate(table.blocks):
        if block is not None and not ledger.pool.is_place(number, block):
            problems.append(f"block {block} is at number {number}, which lies in another arena")
    for number, block in enumerate(table.blocks[: len(keys)]):
        key = None if block is None else ledger.key_of(block)
        # A block about to be replaced by a private copy may still have its old name.
        if key not in (None, keys[number]) and (number not in pending or number in table.read_only):
            problems.append(f"block {block} is held for other tokens than it has")
    if (ledger.spec.kind is LayerKind.RECURRENT) != (group in lease.states):
        problems.append("a lease has a running state too many or too few")
    elif group in lease.states and not ledger.is_private(lease.states[group]):
        problems.append(f"block {lease.states[group]} is a running state and not private")
    return [f"group {ledger.spec.name}: {problem}" for problem in problems]
