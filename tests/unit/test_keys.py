"""The names of content are the documented bytes, everywhere and for ever."""

import array
import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kvkeep.blocks import Namespace, TokenChain, pack_tokens
from kvkeep.errors import RequestError
from kvkeep.spec import BlockKey

FORMATS = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
FIELDS: dict[str, Any] = {
    "model": "sha256:0a1b",
    "positions": "rope:10000",
    "kv_format": "bf16",
    "block_size": 4,
    "policy": "",
    "salt": "",
}
# The chain of tokens 1..9 in that namespace, block size 4: root, block 0, block 1.
ROOT = "02cde7c6bb14bebd95406da1dcc392cebd89cbd8b48978e0ee4b90e78a8e6952"
BLOCK_0 = "00b5bf2b0a495a234478cd6babdf2327fed2877a6aeed9f653f6faeac1a9f82c"
BLOCK_1 = "a6ad312e568c67576cc17db91bf148824e5c66cae2825912246b0bf131290060"
# The same tokens for salt "Müller".
SALTED_ROOT = "e1b85e3eb32aebd411fddce40ace9092b637675fbf5228a8660f151876fee036"
SALTED_BLOCK_0 = "eed9dcf6e609bf9d804630bf1c944171ec39c1cb9125b6b99a4c1ce11c6fbf7c"


def namespace(**changes: object) -> Namespace:
    """The namespace of the vectors, with changes."""
    return Namespace(**(FIELDS | changes))


def text(value: str) -> bytes:
    """A field as it is hashed: its length in four bytes, then UTF-8."""
    encoded = value.encode("utf-8")
    return len(encoded).to_bytes(4, "little") + encoded


def test_a_namespace_is_hashed_as_documented() -> None:
    """The root is SHA-256 over a magic and every field with its length."""
    by_hand = sha256(
        b"kvkeep.namespace/1\x00"
        b"\x0b\x00\x00\x00sha256:0a1b"
        b"\x0a\x00\x00\x00rope:10000"
        b"\x04\x00\x00\x00bf16"
        b"\x01\x00\x00\x004"
        b"\x00\x00\x00\x00"
        b"\x00\x00\x00\x00"
    ).digest()

    assert namespace().root_key() == by_hand
    assert by_hand.hex() == ROOT


def test_a_block_key_is_hashed_as_documented() -> None:
    """A key is SHA-256 over the parent's 32 bytes and the tokens as little-endian uint32."""
    first = sha256(bytes.fromhex(ROOT) + bytes.fromhex("01000000020000000300000004000000")).digest()
    second = sha256(first + bytes.fromhex("05000000060000000700000008000000")).digest()

    chain = TokenChain(namespace().root_key(), 4, range(1, 10))

    assert chain.keys == [first, second]
    assert [key.hex() for key in chain.keys] == [BLOCK_0, BLOCK_1]


def test_text_beyond_ascii_is_hashed_as_utf8() -> None:
    """A salt of any language gives the documented bytes."""
    salted = namespace(salt="Müller")
    by_hand = sha256(
        b"kvkeep.namespace/1\x00"
        + text("sha256:0a1b") + text("rope:10000") + text("bf16") + text("4")
        + b"\x00\x00\x00\x00" + b"\x07\x00\x00\x00M\xc3\xbcller"
    ).digest()  # fmt: skip

    chain = TokenChain(salted.root_key(), 4, [1, 2, 3, 4])

    assert salted.root_key() == by_hand
    assert salted.root_key().hex() == SALTED_ROOT
    assert chain.keys[0].hex() == SALTED_BLOCK_0


def test_the_vectors_in_the_documents_hold() -> None:
    """Every vector of docs/formats.md is what the code computes."""
    blocks = re.findall(r"```json\n(.*?)```", FORMATS.read_text("utf-8"), re.DOTALL)
    vectors = json.loads(blocks[0])

    assert len(vectors) >= 3
    for vector in vectors:
        root = Namespace(**vector["namespace"]).root_key()
        chain = TokenChain(root, vector["namespace"]["block_size"], vector["tokens"])
        assert root.hex() == vector["root"]
        assert [key.hex() for key in chain.keys] == vector["keys"]


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_keys_are_equal_in_every_process(hash_seed: str) -> None:
    """Python's hash randomisation does not reach the keys."""
    program = (
        "from kvkeep.blocks import Namespace, TokenChain;"
        f"root = Namespace(**{FIELDS!r}).root_key();"
        "print(*[key.hex() for key in TokenChain(root, 4, range(1, 10)).keys])"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert result.stdout.split() == [BLOCK_0, BLOCK_1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "sha256:0a1c"),
        ("positions", "rope:500000"),
        ("kv_format", "int8"),
        ("block_size", 8),
        ("policy", "window"),
        ("salt", "tenant"),
    ],
)
def test_every_field_of_a_namespace_separates(field: str, value: object) -> None:
    """Namespaces that differ in one field share no key."""
    assert namespace(**{field: value}).root_key() != namespace().root_key()


def test_text_does_not_slip_from_one_field_into_the_next() -> None:
    """Lengths are hashed, so that shifting a border gives another root."""
    roots = {
        namespace(model="ab", positions="c").root_key(),
        namespace(model="a", positions="bc").root_key(),
        namespace(model="abc", positions="").root_key(),
        namespace(policy="x", salt="").root_key(),
        namespace(policy="", salt="x").root_key(),
    }

    assert len(roots) == 5


def test_a_salt_may_hold_lone_surrogates() -> None:
    """What JSON can carry is a salt, and different salts stay different."""
    roots = {namespace(salt=salt).root_key() for salt in ("\ud800", "\ud801", "?")}

    assert len(roots) == 3


def chain_of(token_ids: list[int], block_size: int = 3) -> TokenChain:
    """A chain in some namespace."""
    return TokenChain(BlockKey(b"r" * 32), block_size, token_ids)


def assert_same(left: TokenChain, right: TokenChain) -> None:
    """Both chains have equal tokens and keys."""
    assert left.tokens() == right.tokens()
    assert left.keys == right.keys
    assert len(left) == len(right)


@pytest.mark.parametrize("pieces", [[1] * 10, [3, 3, 3], [2, 5, 0, 3], [10]])
def test_appending_gives_the_keys_of_a_fresh_chain(pieces: list[int]) -> None:
    """How tokens arrive leaves no trace in the keys."""
    chain, token_ids = chain_of([]), list(range(100, 110))
    start = 0
    for size in pieces:
        chain.append(token_ids[start : start + size])
        start += size

        assert_same(chain, chain_of(token_ids[:start]))


@pytest.mark.parametrize("num_tokens", range(8))
def test_truncating_and_going_on_gives_the_keys_of_a_fresh_chain(num_tokens: int) -> None:
    """Nothing of what was cut off stays."""
    chain = chain_of([1, 2, 3, 4, 5, 6, 7])
    chain.truncate(num_tokens)
    assert_same(chain, chain_of([1, 2, 3, 4, 5, 6, 7][:num_tokens]))

    chain.append([9, 9, 9, 9])

    assert_same(chain, chain_of([*range(1, num_tokens + 1), 9, 9, 9, 9]))


def test_a_fork_goes_its_own_way() -> None:
    """Neither chain sees what the other appends or cuts."""
    chain = chain_of([1, 2, 3, 4])
    fork = chain.fork()

    chain.append([5, 6])
    fork.truncate(2)
    fork.append([7])

    assert_same(chain, chain_of([1, 2, 3, 4, 5, 6]))
    assert_same(fork, chain_of([1, 2, 7]))


def test_a_key_depends_on_every_token_before_it() -> None:
    """One changed token changes the keys of its block and of all behind, and none before."""
    keys, changed = chain_of(list(range(9))).keys, chain_of([0, 1, 2, 3, 99, 5, 6, 7, 8]).keys

    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, False]


def test_contents_are_the_documented_bytes() -> None:
    """What is compared on a hit are the bytes that were hashed."""
    chain = chain_of([1, 2**32 - 1, 3, 4, 5, 6, 7])

    assert chain.block_content(0, 1) == [bytes.fromhex("01000000ffffffff03000000")]
    assert chain.block_content(1, 2) == [chain.packed(3, 6)]
    assert chain.packed(6, 9) == bytes.fromhex("07000000")
    assert chain.parent_key(0) == b"r" * 32
    assert chain.parent_key(2) == chain.keys[1]


@pytest.mark.parametrize(
    "token_ids", [[-1], [2**32], ["1"], [1.0], [None], "12", [[1]], 5], ids=repr
)
def test_what_is_no_token_id_is_refused(token_ids: object) -> None:
    """Bad token ids are the request's fault, and the message shows them."""
    with pytest.raises(RequestError, match="token_ids="):
        pack_tokens(token_ids)  # type: ignore[arg-type]
    with pytest.raises(RequestError):
        chain_of(token_ids)  # type: ignore[arg-type]


def test_a_refused_append_leaves_the_chain_as_it_was() -> None:
    """Not even the good tokens before a bad one are added."""
    chain = chain_of([1, 2])

    with pytest.raises(RequestError):
        chain.append([3, 4, -1])

    assert_same(chain, chain_of([1, 2]))


def test_bytes_are_a_sequence_of_small_integers() -> None:
    """Bytes are iterated like any sequence, not taken for the memory of an array."""
    assert list(pack_tokens(b"\x01\x02\x03\x04")) == [1, 2, 3, 4]
    assert list(pack_tokens(bytearray(b"\x05"))) == [5]
    assert list(pack_tokens(array.array("q", [7, 8]))) == [7, 8]
