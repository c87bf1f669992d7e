"""What a session has turned away from: another context, or another branch of its conversation.

With `context="auto"` a request is taken for a turn to another context when it keeps less than a share of what
the session's last chain (prompt and output) has of its own: of the full blocks behind those that others use
too, as far as the new prompt goes. What others use too, such as a system prompt, is the same whatever the
session speaks of; behind it the beginning of a conversation tells as much as its end. The share is the
setting `context_share`; the false alarms and missed turns of several are in docs/lifetimes.md.

A false alarm computes nothing twice by itself: what both chains begin with stays, and only blocks that the
new prompt cannot reuse go first when room is needed. Blocks of others are never demoted.
"""

from collections.abc import Callable, Sequence

from kvkeep.cache.lifetimes.labels import ContextId
from kvkeep.cache.lifetimes.register import Register
from kvkeep.cache.lifetimes.sessions import Session
from kvkeep.spec import BlockKey

__all__ = ["AUTO", "common_blocks", "is_turn", "turned_away", "turns"]

AUTO = "auto"


def common_blocks(left: Sequence[BlockKey], right: Sequence[BlockKey]) -> int:
    """How many leading blocks are the same. Keys name whole prefixes, so that halving finds the number."""
    return _num_leading(min(len(left), len(right)), lambda number: left[number] == right[number])


def is_turn(
    last: Sequence[BlockKey],
    new: Sequence[BlockKey],
    share: float,
    *,
    is_shared: Callable[[BlockKey], bool],
) -> bool:
    """Whether a prompt is about something else than the chain before it; False where either is too short.

    A `share` of 0 sees no turn. `is_shared` says of a block of the last chain whether others use it too.
    """
    # Whoever uses a block uses those before it.
    num_shared = _num_leading(len(last), lambda number: is_shared(last[number]))
    shorter = min(len(last), len(new)) - num_shared
    kept = max(0, common_blocks(last, new) - num_shared)
    return shorter > 0 and kept < share * shorter


def turns(register: Register, session: Session, new: Sequence[BlockKey], share: float) -> bool:
    """`is_turn` for the last chain of a session and the blocks of its next prompt."""
    name = session.session_id.name

    def is_shared(key: BlockKey) -> bool:
        labels = register.get(key)
        return labels is not None and not labels.is_owned_by(name)

    return is_turn(session.last_keys, new, share, is_shared=is_shared)


def turned_away(
    register: Register, session: Session, left_context: str | None, new: Sequence[BlockKey]
) -> list[BlockKey]:
    """What a session leaves with its next prompt; leaves come last.

    Blocks of its last chain that the prompt does not have, when it begins with one of them, and blocks that
    only `left_context` used, as far as nobody else uses them.
    """
    own, name = set(new), session.session_id.name
    left: list[BlockKey] = []
    if common_blocks(session.last_keys, new):
        for key in session.last_keys:
            labels = register.get(key)
            if key not in own and labels is not None and labels.is_owned_by(name):
                left.append(key)
    if left_context is not None:
        contexts = frozenset((ContextId(name, left_context),))
        for labels, keys in register.of_session(session.session_id):
            if labels.contexts == contexts and labels.is_owned_by(name):
                left += [key for key in keys if key not in own]
    return list(dict.fromkeys(left))


def _num_leading(most: int, holds: Callable[[int], bool]) -> int:
    """How many of the numbers from 0 on hold, when none does behind the first that does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            low = middle + 1
        else:
            high = middle
    return low
