"""Keys of tenants: one each, durable, readable by nobody else, and gone when they are erased."""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from kvkeep.errors import ConfigError, TierError
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.keyring import FileKeyring, Keyring, MemoryKeyring
from kvkeep.tiers.sealed import Sealed

pytest.importorskip("cryptography", reason="encryption is optional")

SIZE = 10_000
MakeKeyring = Callable[[Path], Keyring]
EVERY_KEYRING = pytest.mark.parametrize(
    "make",
    [lambda _: MemoryKeyring(), lambda path: FileKeyring(path / "keys")],
    ids=["memory", "file"],
)


def cause_of(found: object) -> MissCause:
    """Why a get missed."""
    assert isinstance(found, Miss), found
    return found.cause


@EVERY_KEYRING
def test_a_tenant_keeps_its_key(make: MakeKeyring, tmp_path: Path) -> None:
    """Looking makes none; obtaining makes one, once; any text is a tenant."""
    keyring = make(tmp_path)
    odd = "../../etc/passwd\0\ud800"

    assert keyring.find("ann") is None
    key = keyring.obtain("ann")

    assert keyring.obtain("ann") == keyring.find("ann") == key
    assert (len(key.key_id), len(key.secret)) == (16, 32)
    assert keyring.obtain(odd) != key
    assert keyring.tenants() == sorted(["ann", odd])
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)


def test_another_process_sees_keys_and_erasures(tmp_path: Path) -> None:
    """Two keyrings on one folder agree at every moment."""
    ours, theirs = FileKeyring(tmp_path), FileKeyring(tmp_path)
    key = ours.obtain("ann")

    assert theirs.find("ann") == key
    assert theirs.erase("ann")
    assert ours.find("ann") is None
    assert theirs.obtain("ann") == ours.obtain("ann") != key


def test_threads_and_processes_that_obtain_at_once_get_one_key(tmp_path: Path) -> None:
    """Whoever is first makes the key that all have."""
    keys = []
    threads = [
        Thread(target=lambda: keys.append(FileKeyring(tmp_path).obtain("ann"))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(keys) == 16
    assert len({key.secret for key in keys}) == 1


def test_key_files_are_the_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask says, from the start; one that was opened to others is not used."""
    before = os.umask(0)
    try:
        keyring = FileKeyring(tmp_path / "keys")
        keyring.obtain("ann")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "keys").glob("*")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    with pytest.raises(TierError, match="chmod 600"):
        keyring.find("ann")
    tier = Sealed(HostTier(1 << 20), keyring, lambda _: "ann")
    assert store_object(tier, key_of(1), SIZE) is PutOutcome.FAILED
    assert cause_of(read_object(tier, key_of(1), SIZE)) is MissCause.UNAVAILABLE
    assert tier.find([key_of(1)]) == [Presence.ABSENT]
    assert tier.sweep() == 0
    assert tier.stats().puts["failed"] == 1


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """They could put a key of their own in place of a tenant's."""
    tmp_path.chmod(0o777)

    with pytest.raises(ConfigError, match="chmod 700"):
        FileKeyring(tmp_path)


def test_a_folder_that_cannot_be_is_a_setting_error(tmp_path: Path) -> None:
    """The message names the folder."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"keyring=.*file"):
        FileKeyring(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"version": 2}'])
def test_a_damaged_key_file_is_unavailable_not_erased(tmp_path: Path, content: bytes) -> None:
    """Objects of that tenant must not be swept: the file may come back from a backup."""
    keyring = FileKeyring(tmp_path)
    good = keyring.obtain("ann")
    inner = HostTier(1 << 20)
    tier = Sealed(inner, keyring, lambda _: "ann")
    store_object(tier, key_of(0), SIZE)
    (path,) = tmp_path.glob("*.key")
    whole = path.read_bytes()
    path.write_bytes(content)

    assert cause_of(read_object(tier, key_of(0), SIZE)) is MissCause.UNAVAILABLE
    assert tier.sweep() == 0
    path.write_bytes(whole)
    assert keyring.find("ann") == good
    assert read_object(tier, key_of(0), SIZE) == content_of(key_of(0), SIZE)
    assert len(list(inner.objects())) == 1


def test_what_a_dead_process_left_is_cleared_away(tmp_path: Path) -> None:
    """An erasure is brought to its end; a new key that never got its name goes once it is old."""
    keyring = FileKeyring(tmp_path)
    keyring.obtain("ann")
    for name in (".erased-1", ".new-old", ".new-young"):
        (tmp_path / name).write_bytes(b"secret")
    os.utime(tmp_path / ".new-old", (time.time() - 3600,) * 2)

    FileKeyring(tmp_path)

    assert {path.name for path in tmp_path.glob(".*")} == {".new-young"}
    assert FileKeyring(tmp_path).tenants() == ["ann"]


def test_an_erased_key_is_overwritten_before_it_goes(tmp_path: Path) -> None:
    """Who still holds the file finds zeros in it."""
    keyring = FileKeyring(tmp_path)
    keyring.obtain("ann")
    (path,) = tmp_path.glob("*.key")
    with path.open("rb") as held:
        keyring.erase("ann")

        assert set(held.read()) == {0}
    assert list(tmp_path.iterdir()) == []
