"""What is sealed is unreadable without its tenant's key, and cannot be changed unnoticed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread

import pytest

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, cut, key_of, read_object, store_object
from kvkeep.tiers.base import Got, Miss, MissCause, Occasion, Presence, PutOutcome
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.keyring import FileKeyring, Keyring, MemoryKeyring
from kvkeep.tiers.sealed import SEAL_BYTES, Sealed
from kvkeep.tiers.stack import Floor, TierStack

pytest.importorskip("cryptography", reason="encryption is optional")

SIZE = 10_000
MakeKeyring = Callable[[Path], Keyring]
EVERY_KEYRING = pytest.mark.parametrize(
    "make",
    [lambda _: MemoryKeyring(), lambda path: FileKeyring(path / "keys")],
    ids=["memory", "file"],
)


def tenant_of(key: StoredKey) -> str:
    """Test objects of even number belong to ann, the others to bob."""
    return "ann" if key in {key_of(number) for number in range(0, 40, 2)} else "bob"


def sealed_pair(keyring: Keyring) -> tuple[HostTier, Sealed]:
    """A tier, and the same sealed."""
    inner = HostTier(1 << 20)
    return inner, Sealed(inner, keyring, tenant_of)


def raw(inner: HostTier, key: StoredKey, num_bytes: int = SIZE) -> bytearray:
    """What really lies in the tier."""
    buffer = bytearray(SEAL_BYTES + num_bytes)
    assert isinstance(inner.get(key, [memoryview(buffer)]), Got)
    return buffer


def replace(inner: HostTier, key: StoredKey, content: bytes | bytearray) -> None:
    """Lay other bytes under a key."""
    inner.delete([key])
    assert inner.put(key, [memoryview(content)], len(content)) is PutOutcome.STORED


def cause_of(found: object) -> MissCause:
    """Why a get missed."""
    assert isinstance(found, Miss), found
    return found.cause


@EVERY_KEYRING
def test_nothing_of_the_content_is_in_the_medium(make: MakeKeyring, tmp_path: Path) -> None:
    """Not one aligned run of 16 bytes of the object is stored; it comes back all the same."""
    inner, tier = sealed_pair(make(tmp_path))
    key, content = key_of(1), b"The patient's name is Smith, born " * 300

    assert tier.put(key, cut(content, [100, 4096]), len(content)) is PutOutcome.STORED

    stored = bytes(raw(inner, key, len(content)))
    assert stored[:8] == b"KVKEEPS1"
    assert content[:16] not in stored
    assert all(content[at : at + 16] not in stored for at in range(0, len(content), 16))
    buffer = bytearray(len(content))
    assert tier.get(key, cut(buffer, [4096])) == Got(len(content))
    assert bytes(buffer) == content


def test_equal_objects_are_stored_as_different_bytes() -> None:
    """A nonce is never used again, not for the same object either."""
    inner, tier = sealed_pair(MemoryKeyring())
    seen = []
    for _ in range(20):
        store_object(tier, key_of(1), SIZE)
        seen.append(bytes(raw(inner, key_of(1))))
        tier.delete([key_of(1)])

    assert len({stored[SEAL_BYTES:] for stored in seen}) == 20
    assert len({stored[32:44] for stored in seen}) == 20


# Every field of the seal, the zeros behind it, and the ciphertext from its first to its last byte.
@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 31, 32, 43, 44, 59, 60, 4095, 4096, 9000, -1])
def test_a_flipped_bit_is_a_miss_wherever_it_is(at: int) -> None:
    """The object is not given out, and the same one without the flip is."""
    inner, tier = sealed_pair(MemoryKeyring())
    store_object(tier, key_of(1), SIZE)
    good = raw(inner, key_of(1))
    bad = bytearray(good)
    bad[at] ^= 1
    replace(inner, key_of(1), bad)

    found = read_object(tier, key_of(1), SIZE)

    # Another key id says that it was sealed with a key that is gone.
    assert cause_of(found) is (MissCause.ABSENT if at in (16, 31) else MissCause.CORRUPT)
    assert tier.stats().misses[cause_of(found)] == 1
    replace(inner, key_of(1), good)
    assert read_object(tier, key_of(1), SIZE) == content_of(key_of(1), SIZE)


def test_an_object_in_another_ones_place_is_corrupt() -> None:
    """Two objects of one tenant and length, swapped in the medium, open in neither place."""
    inner, tier = sealed_pair(MemoryKeyring())
    for number in (1, 3):
        store_object(tier, key_of(number), SIZE)
    first, second = raw(inner, key_of(1)), raw(inner, key_of(3))
    replace(inner, key_of(1), second)
    replace(inner, key_of(3), first)

    for number in (1, 3):
        assert cause_of(read_object(tier, key_of(number), SIZE)) is MissCause.CORRUPT


def test_one_tenants_key_does_not_open_what_is_anothers() -> None:
    """Who is told that an object is bob's cannot read what was sealed as ann's."""
    inner, keyring = HostTier(1 << 20), MemoryKeyring()
    keyring.obtain("bob")
    store_object(Sealed(inner, keyring, lambda _: "ann"), key_of(1), SIZE)

    found = read_object(Sealed(inner, keyring, lambda _: "bob"), key_of(1), SIZE)

    assert isinstance(found, Miss)


@EVERY_KEYRING
def test_erasing_a_key_erases_the_tenant_and_nobody_else(make: MakeKeyring, tmp_path: Path) -> None:
    """All that was ann's is absent at once, can be swept, and bob has lost nothing."""
    keyring = make(tmp_path)
    inner, tier = sealed_pair(keyring)
    for number in range(10):
        store_object(tier, key_of(number), SIZE)
        tier.relabel(key_of(number), b"session 7")

    assert keyring.erase("ann")
    assert not keyring.erase("ann")

    keys = [key_of(number) for number in range(10)]
    expected = [Presence.ABSENT, Presence.PRESENT] * 5
    assert tier.find(keys) == expected
    assert read_object(tier, key_of(0), SIZE) == Miss(MissCause.ABSENT, "erased")
    assert tier.labels(key_of(0)) is None
    assert not tier.relabel(key_of(0), b"again")
    assert {item.key for item in tier.objects()} == set(keys[1::2])
    assert len(list(inner.objects())) == 10
    assert tier.sweep() == 5
    assert {item.key for item in inner.objects()} == set(keys[1::2])
    assert read_object(tier, key_of(1), SIZE) == content_of(key_of(1), SIZE)
    assert tier.labels(key_of(1)) == b"session 7"


def test_a_tenant_that_comes_back_starts_anew() -> None:
    """What was sealed with the erased key is absent and makes room for what is sealed with the new one."""
    keyring = MemoryKeyring()
    inner, tier = sealed_pair(keyring)
    store_object(tier, key_of(0), SIZE)
    old = raw(inner, key_of(0))
    keyring.erase("ann")
    keyring.obtain("ann")

    assert cause_of(read_object(tier, key_of(0), SIZE)) is MissCause.ABSENT
    assert store_object(tier, key_of(0), SIZE) is PutOutcome.STORED

    assert raw(inner, key_of(0)) != old
    assert read_object(tier, key_of(0), SIZE) == content_of(key_of(0), SIZE)


def test_what_a_sealed_tier_evicts_falls_down_readable() -> None:
    """The tier below gets the object itself, and seals it for itself if it is to."""
    keyring = MemoryKeyring()
    above, below = HostTier(SEAL_BYTES + 12288), HostTier(1 << 20)
    every = frozenset(Occasion)
    stack = TierStack(
        [
            Floor(Sealed(above, keyring, tenant_of), every),
            Floor(below, frozenset({Occasion.EVICTED})),
        ]
    )
    content = content_of(key_of(1), SIZE)
    stack.put(key_of(1), lambda: [memoryview(content)], SIZE, Occasion.FINISHED)
    stack.put(key_of(3), lambda: [memoryview(content_of(key_of(3), SIZE))], SIZE, Occasion.FINISHED)

    assert above.find([key_of(1)]) == [Presence.ABSENT]
    assert read_object(below, key_of(1), SIZE) == content


def test_an_erased_tenants_evicted_objects_fall_nowhere() -> None:
    """Nobody can open them, so nobody gets them."""
    keyring = MemoryKeyring()
    inner = HostTier(SEAL_BYTES + 12288)
    tier = Sealed(inner, keyring, tenant_of)
    seen: list[StoredKey] = []

    def spill(key: StoredKey, _: Sequence[memoryview], labels: bytes) -> None:
        assert labels == b""
        seen.append(key)

    tier.on_evict = spill
    store_object(tier, key_of(0), SIZE)
    keyring.erase("ann")
    store_object(tier, key_of(1), SIZE)
    store_object(tier, key_of(3), SIZE)

    assert seen == [key_of(1)]


def test_labels_of_one_object_do_not_fit_another() -> None:
    """Labels are sealed like objects: unreadable in the medium, and bound to their key."""
    inner, tier = sealed_pair(MemoryKeyring())
    for number in (1, 3):
        store_object(tier, key_of(number), SIZE)
    tier.relabel(key_of(1), b"doc:77")
    sealed = inner.labels(key_of(1))
    assert sealed is not None

    assert b"doc:77" not in sealed
    assert tier.labels(key_of(1)) == b"doc:77"
    inner.relabel(key_of(3), sealed)
    assert tier.labels(key_of(3)) is None
    inner.relabel(key_of(1), sealed[:-1])
    assert tier.labels(key_of(1)) is None
    inner.relabel(key_of(1), b"short")
    assert tier.labels(key_of(1)) is None


def test_labels_of_a_put_are_sealed_too() -> None:
    """They come with a get, opened; unreadable ones make the object one that nobody uses."""
    inner, tier = sealed_pair(MemoryKeyring())
    for number in range(3):
        store_object(tier, key_of(number), SIZE, b"doc:77")
    buffer = memoryview(bytearray(SIZE))

    assert all(b"doc" not in item.labels for item in inner.labelled())
    assert tier.get(key_of(0), [buffer]) == Got(SIZE, b"doc:77")
    foreign = inner.labels(key_of(1))
    assert foreign is not None
    inner.relabel(key_of(0), foreign)
    assert cause_of(read_object(tier, key_of(0), SIZE)) is MissCause.CORRUPT
    assert {item.key for item in tier.labelled()} == {key_of(1), key_of(2)}
    assert {(item.num_bytes, item.labels) for item in tier.labelled()} == {(SIZE, b"doc:77")}


def test_an_erased_tenants_labels_are_gone() -> None:
    """Nothing is listed of it, and nothing can be replaced."""
    keyring = MemoryKeyring()
    inner, tier = sealed_pair(keyring)
    for number in range(4):
        store_object(tier, key_of(number), SIZE, b"old")

    keyring.erase("ann")
    done = tier.revise_labels([key_of(number) for number in range(4)], lambda _key, _old: b"new")

    assert done == [False, True, False, True]
    assert [item.key for item in tier.labelled()] == [key_of(1), key_of(3)]
    assert len(list(inner.labelled())) == 4


def test_labels_fall_opened_and_are_sealed_anew() -> None:
    """Between two sealed tiers, each with keys of its own."""
    above = Sealed(HostTier(SEAL_BYTES + 12288), MemoryKeyring(), tenant_of)
    below = Sealed(HostTier(1 << 20), MemoryKeyring(), tenant_of)
    stack = TierStack([Floor(tier, frozenset(Occasion)) for tier in (above, below)])
    for number in (1, 3):
        content = memoryview(content_of(key_of(number), SIZE))
        above.put(key_of(number), [content], SIZE, b"tag")

    assert stack.tiers[0].find([key_of(1)]) == [Presence.ABSENT]
    assert below.get(key_of(1), [memoryview(bytearray(SIZE))]) == Got(SIZE, b"tag")


def test_a_refused_object_costs_no_memory() -> None:
    """Parts of what is too large are never asked for."""
    tier = Sealed(HostTier(1 << 20), MemoryKeyring(), tenant_of)

    def parts() -> Iterator[memoryview]:
        yield memoryview(b"")
        raise AssertionError

    assert tier.put(key_of(1), parts(), 1 << 40) is PutOutcome.REFUSED


def test_threads_share_a_sealed_tier() -> None:
    """Memory for ciphertext is used again, never by two calls at once."""
    _, tier = sealed_pair(MemoryKeyring())
    faults: list[int] = []

    def work(first: int) -> None:
        for turn in range(60):
            number = first + turn % 5
            store_object(tier, key_of(number), SIZE)
            if read_object(tier, key_of(number), SIZE) != content_of(key_of(number), SIZE):
                faults.append(number)

    threads = [Thread(target=work, args=(first,)) for first in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert faults == []


def test_without_the_library_a_setting_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encryption is optional; who asks for it learns how to get it."""
    monkeypatch.delitem(sys.modules, "kvkeep.tiers.aead", raising=False)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)

    with pytest.raises(ConfigError, match=r"kvkeep\[encryption\]"):
        Sealed(HostTier(1 << 20), MemoryKeyring(), tenant_of)
