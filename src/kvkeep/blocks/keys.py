"""The name of content: chain keys over canonical bytes (exact bytes, vectors: docs/formats.md).

A block's key depends on everything its K/V depend on: the namespace (who may share) and every token
from the first to its last. Keys are equal across processes, operating systems and restarts.
"""

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, fields
from hashlib import sha256

from kvkeep.errors import RequestError
from kvkeep.spec import BlockKey, StoredKey

__all__ = ["Namespace", "TokenChain", "pack_tokens", "stored_key"]

_NAMESPACE_MAGIC = b"kvkeep.namespace/1\0"
_TOKEN_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Namespace:
    """Who may share: what differs in any field never meets.

    Fields, in the order in which they are hashed: `model` (fingerprint of weights, config and
    adapter), `positions` (RoPE type and regime), `kv_format`, `block_size`, `policy` (lossy policy,
    "" for exact) and `salt` (the tenant's, "" for none).
    """

    model: str
    positions: str
    kv_format: str
    block_size: int
    policy: str = ""
    salt: str = ""

    def root_key(self) -> BlockKey:
        """The parent of every first block of this namespace."""
        digest = sha256(_NAMESPACE_MAGIC)
        for field in fields(self):
            # A salt may come from a client; lone surrogates are text to JSON, not to strict UTF-8.
            value = str(getattr(self, field.name)).encode(errors="surrogatepass")
            digest.update(len(value).to_bytes(4, "little") + value)
        return BlockKey(digest.digest())


def stored_key(key: BlockKey, group: int) -> StoredKey:
    """The name under which tiers keep a KV group's part of a block."""
    return StoredKey(key + group.to_bytes(1, "little"))


def pack_tokens(token_ids: Iterable[int]) -> "array[int]":
    """Token ids as unsigned 32-bit integers. Raises RequestError for what is not a token id."""
    if isinstance(token_ids, str):  # type: ignore[unreachable]  # callers are not typed
        raise RequestError(
            f"token_ids={token_ids!r:.80} is text; give token ids, such as LLM.encode makes of it"
        )
    try:
        # An array would take bytes for its own memory, four to an integer.
        return array(
            "I", list(token_ids) if isinstance(token_ids, bytes | bytearray) else token_ids
        )
    except (TypeError, OverflowError) as error:
        raise RequestError(
            f"token_ids={token_ids!r:.80} are not token ids ({error}); "
            "give integers from 0 to 2**32-1"
        ) from error


class TokenChain:
    """The tokens of one request and the keys of its full blocks, each computed once.

    Appending is amortised O(1); keys appear as blocks fill up.
    """

    __slots__ = ("_tokens", "block_size", "keys", "root")

    def __init__(self, root: BlockKey, block_size: int, token_ids: Iterable[int] = ()) -> None:
        self.root = root
        self.block_size = block_size
        self.keys: list[BlockKey] = []
        self._tokens = pack_tokens(token_ids)
        self._hash_full_blocks()

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Token ids of positions `start <= p < stop`."""
        return self._tokens[start:stop].tolist()

    def append(self, token_ids: Iterable[int]) -> None:
        """Add tokens behind the last one; adds none when one of them is not a token id."""
        self._tokens.extend(pack_tokens(token_ids))
        if len(self._tokens) // self.block_size > len(self.keys):
            self._hash_full_blocks()

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        assert 0 <= num_tokens <= len(self._tokens)
        del self._tokens[num_tokens:]
        del self.keys[num_tokens // self.block_size :]

    def fork(self) -> "TokenChain":
        """An independent chain with the same tokens."""
        other = TokenChain(self.root, self.block_size)
        other._tokens = self._tokens[:]
        other.keys = self.keys[:]
        return other

    def parent_key(self, block: int) -> BlockKey:
        """The key of the block before the `block`-th, or the namespace's root."""
        return self.keys[block - 1] if block else self.root

    def block_content(self, start: int, stop: int) -> list[bytes]:
        """The canonical token bytes of blocks `start <= block < stop`, for comparing on a hit."""
        size = self.block_size * _TOKEN_BYTES
        packed = self.packed(start * self.block_size, stop * self.block_size)
        return [packed[at : at + size] for at in range(0, len(packed), size)]

    def packed(self, start: int, stop: int) -> bytes:
        """The canonical bytes of positions `start <= p < stop`, as far as there are tokens."""
        tokens = self._tokens[start:stop]
        if sys.byteorder == "big":
            tokens.byteswap()
        return tokens.tobytes()

    def _hash_full_blocks(self) -> None:
        start = len(self.keys)
        stop = len(self._tokens) // self.block_size
        parent = self.parent_key(start)
        new_keys: list[BlockKey] = []
        for content in self.block_content(start, stop):
            parent = BlockKey(sha256(parent + content).digest())
            new_keys.append(parent)
        self.keys += new_keys
