"""Two prompts side by side: where they part, and what of one comes again in the other."""

import sys
from array import array

__all__ = ["TOKEN_BYTES", "common_tokens", "recurring_tokens", "unpack_tokens"]

# Tokens are compared as packed bytes: see kvkeep.blocks.TokenChain.packed.
TOKEN_BYTES = 4
# Text of so many tokens in a row is taken for the same text.
_WINDOW = 16
# Positions that are tried before the rest is taken for new text; bounds the time of a comparison.
_MOST_TRIES = 2048


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """The token ids of packed bytes."""
    tokens = array("I", packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


def common_tokens(one: bytes, other: bytes, *, one_at: int = 0, other_at: int = 0) -> int:
    """How many packed tokens are equal from the given positions on.

    >>> common_tokens(b"aaaabbbbcccc", b"aaaabbbbdddd"), common_tokens(b"aaaa", b"")
    (2, 0)
    """
    shift = other_at - one_at
    low = one_at
    high = one_at + min(len(one) // TOKEN_BYTES - one_at, len(other) // TOKEN_BYTES - other_at)
    # All before `low` are equal; each round compares half of what is left.
    while low < high:
        middle = (low + high + 1) // 2
        mine = one[low * TOKEN_BYTES : middle * TOKEN_BYTES]
        if other.startswith(mine, (low + shift) * TOKEN_BYTES):
            low = middle
        else:
            high = middle - 1
    return low - one_at


def recurring_tokens(sent: bytes, earlier: bytes, start: int) -> int:
    """How many packed tokens of `sent` from `start` on are runs of `earlier` from there on.

    Runs shorter than a window are overlooked, and so is what follows thousands of tokens of new text.
    """
    window_bytes = _WINDOW * TOKEN_BYTES
    window_to_position: dict[bytes, int] = {}
    for at in range(start, len(earlier) // TOKEN_BYTES - _WINDOW + 1, _WINDOW):
        window = earlier[at * TOKEN_BYTES : at * TOKEN_BYTES + window_bytes]
        window_to_position.setdefault(window, at)
    found = num_tries = 0
    at, last, behind = start, len(sent) // TOKEN_BYTES - _WINDOW, start
    while at <= last and num_tries < _MOST_TRIES:
        window = sent[at * TOKEN_BYTES : at * TOKEN_BYTES + window_bytes]
        match = window_to_position.get(window)
        if match is None:
            at += 1
            num_tries += 1
            continue
        run = common_tokens(sent, earlier, one_at=at, other_at=match)
        # Text begins where it begins, not where a window of the earlier prompt does.
        most = min(_WINDOW, at - behind, match - start)
        found += run + _common_before(sent, earlier, at, match, most)
        at += run
        behind = at
    return found


def _common_before(one: bytes, other: bytes, one_at: int, other_at: int, most: int) -> int:
    """How many tokens before two positions are equal, `most` at the most."""
    for back in range(1, most + 1):
        mine, yours = (one_at - back) * TOKEN_BYTES, (other_at - back) * TOKEN_BYTES
        if one[mine : mine + TOKEN_BYTES] != other[yours : yours + TOKEN_BYTES]:
            return back - 1
    return most
