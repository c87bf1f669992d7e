"""What a session has turned away from: another context, or another branch of its conversation.

With `context="auto"` a request is taken for a turn to another context when it keeps less than a share of the
conversation: of the shorter of the two, the session's last chain (prompt and output) and the new prompt, the
part of the full blocks that both begin with. A conversation that goes on keeps all of its last chain but
perhaps the end of the last answer; one whose history was cut or edited keeps what is before the cut; a new
subject keeps the system prompt at the most. The share is the setting `context_share`.

A false alarm computes nothing twice by itself: what both chains begin with stays, and only blocks that the
new prompt cannot reuse go first when room is needed.
"""

from collections.abc import Sequence

from kvkeep.spec import BlockKey

__all__ = ["AUTO", "common_blocks", "is_turn"]

AUTO = "auto"


def common_blocks(left: Sequence[BlockKey], right: Sequence[BlockKey]) -> int:
    """How many leading blocks are the same. Keys name whole prefixes, so that halving finds the number."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def is_turn(last: Sequence[BlockKey], new: Sequence[BlockKey], share: float) -> bool:
    """Whether a prompt is about something else than the chain before it; False where either is too short."""
    shorter = min(len(last), len(new))
    return shorter > 0 and common_blocks(last, new) < share * shorter
