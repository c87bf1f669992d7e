"""Audits of tiers: what is right, and every way of being wrong."""

from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.spec import StoredKey
from kvkeep.tiers.audit import audit, why_wrong
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.stored_form import StoredHeader, checksum, encode_header, header_bytes

ROOT = b"r" * 32


def stored(number: int, block_size: int = 8, num_bytes: int = 5000) -> tuple[StoredKey, bytes]:
    """A block as tiers keep it."""
    tokens = number.to_bytes(4, "little") * block_size
    key = sha256(ROOT + tokens).digest()
    payload = bytes((number + at) % 251 for at in range(num_bytes))
    header = StoredHeader(
        key=key, parent=ROOT, namespace=ROOT, tokens=tokens, group=0, group_name="full",
        kv_format="float32", layout="words/1", payload_bytes=num_bytes,
        checksum=checksum([memoryview(payload)]),
    )  # fmt: skip
    return StoredKey(key + b"\0"), encode_header(header, block_size) + payload


@pytest.mark.parametrize("block_size", [1, 8, 760, 800, 2048])
def test_a_block_is_what_it_claims_to_be(block_size: int) -> None:
    """Whatever its size, and so the number of pages before its payload."""
    key, content = stored(1, block_size)
    assert len(content) == header_bytes(block_size) + 5000
    assert why_wrong(key, memoryview(content)) is None


@pytest.mark.parametrize(
    "at", [0, 8, 12, 16, 30, 60, 100, 500, 4000, 4095, 4096, 6000, -1], ids=lambda at: f"byte {at}"
)
def test_no_bit_can_flip_unseen(at: int) -> None:
    """In the prefix, the map, the zeros behind it and the payload."""
    key, content = stored(2)
    for bit in range(8):
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << bit
        assert why_wrong(key, memoryview(spoilt)) is not None, f"bit {bit}"


@pytest.mark.parametrize("length", [0, 1, 15, 23, 24, 100, 4095, 4096, 4097, 9095])
def test_no_end_can_be_missing(length: int) -> None:
    """Of every region, down to nothing."""
    key, content = stored(3)
    assert why_wrong(key, memoryview(content[:length])) is not None


def test_another_block_is_not_this_one() -> None:
    """A whole block under another name, or with tokens that its key does not name."""
    key, content = stored(4)
    other, other_content = stored(5)
    assert why_wrong(key, memoryview(other_content)) is not None
    assert why_wrong(StoredKey(key[:32] + b"\1"), memoryview(content)) is not None
    assert why_wrong(other, memoryview(other_content)) is None


def test_verify_reports_and_repair_puts_aside(tmp_path: Path) -> None:
    """The command counts, names what is wrong, and takes it out only when asked to."""
    with DiskTier(tmp_path, 10**7) as tier:
        for number in range(6):
            key, content = stored(number)
            if number in (2, 4):
                content = content[:-1] + bytes([content[-1] ^ 1])
            tier.put(key, [memoryview(content)], len(content))
    runner = CliRunner()
    found = runner.invoke(main, ["cache", "verify", str(tmp_path)])
    assert found.exit_code == 1, found.output
    assert "6 blocks" in found.output
    assert found.output.count("payload checksum") == 2
    assert runner.invoke(main, ["cache", "verify", str(tmp_path), "--repair"]).exit_code == 0
    again = runner.invoke(main, ["cache", "verify", str(tmp_path), "--json"])
    assert again.exit_code == 0
    assert '"num_objects": 4' in again.output
    with DiskTier(tmp_path, 10**7) as tier:
        assert audit(tier, repair=False).wrong == ()
