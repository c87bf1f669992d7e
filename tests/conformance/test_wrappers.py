"""A wrapped tier is a tier: wrappers around each other, and around each medium, pass the whole suite."""

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.testing.tier_suite import TierSuite
from kvkeep.tiers.base import Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.keyring import FileKeyring, MemoryKeyring
from kvkeep.tiers.metered import Metered
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.sealed import Sealed
from tests.servers import RedisServer

pytest.importorskip("cryptography", reason="encryption is optional")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests of this file."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class TestMetered(TierSuite):
    """Around host memory."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        del folder
        return Metered(HostTier(capacity_bytes))


class TestFaulty(TierSuite):
    """Without faults, and with one that never happens."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        del folder
        return FaultyTier(HostTier(capacity_bytes), [Fault("flip", "get", probability=0.0)])


class TestSealedHost(TierSuite):
    """Objects of a hundred tenants, whose keys are made on the way."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        del folder
        return Sealed(
            HostTier(capacity_bytes), MemoryKeyring(), lambda key: f"tenant {key[0] % 100}"
        )


class TestSealedDisk(TierSuite):
    """Files that only the keys in another folder open, also after a restart."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        keyring = FileKeyring(folder / "keys")
        return Sealed(DiskTier(folder / "blocks", capacity_bytes), keyring, lambda _: "tenant")


class TestSealedResp(TierSuite):
    """In a real server, which other machines and their owners read."""

    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.server = server

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        del capacity_bytes
        prefix = f"kvkeep-test:{crc32(str(folder).encode()):08x}:"
        inner = RespTier(self.server.url, key_prefix=prefix, timeout_s=20, num_connections=3)
        return Metered(Sealed(inner, FileKeyring(folder / "keys"), lambda _: "tenant"))


class TestAllAtOnce(TierSuite):
    """Wrappers compose in any order."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        del folder
        inner = FaultyTier(Metered(HostTier(capacity_bytes)), [])
        return Metered(Sealed(inner, MemoryKeyring(), lambda _: "tenant"))
