import logging
from collections.abc import Iterator, Sequence
from threading import Event, Thread

import pytest

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import HeldParts, content_of, key_of, read_object, store_object
from kvkeep.tiers.base import (
    Got,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
)
from kvkeep.tiers.deadlines import CallError, Deadline, SettingError
from kvkeep.tiers.resp import MAX_VALUE_BYTES, RespTier
from kvkeep.tiers.resp_transport import Deleted, RespTransport, SetResult
from kvkeep.tiers.stored_value import ROOM_BYTES
from tests.dict_transport import DictTransport


@pytest.fixture
def transport() -> DictTransport:
    """A server that is a dict."""
    return DictTransport()


@pytest.fixture
def tier(transport: DictTransport) -> Iterator[RespTier]:
    """A tier on it."""
    with RespTier("redis://nowhere", transport=transport) as tier:
        yield tier


def test_the_dict_is_a_transport(transport: DictTransport) -> None:
    """The seam is a protocol: nothing is inherited."""
    as_protocol: RespTransport = transport

    assert as_protocol.breakers[0].name == "dict"


def test_a_key_is_the_prefix_and_digits(tier: RespTier, transport: DictTransport) -> None:
    """One key for an object, which people and access rules can read."""
    store_object(tier, StoredKey(b"\x00*{}\xff"), 10)

    assert list(transport.values) == [b"kvkeep:002a7b7dff"]


def test_what_is_too_large_is_refused_before_it_is_looked_at(transport: DictTransport) -> None:
    """No part is taken and nothing is sent."""
    tier = RespTier("redis://nowhere", max_object_bytes=1000, transport=transport)

    assert tier.put(key_of(1), iter(_fail, None), 1001) is PutOutcome.REFUSED
    assert store_object(tier, key_of(1), 1000) is PutOutcome.STORED
    assert transport.calls == ["set"]
    assert tier.stats().puts == {"refused": 1, "stored": 1}


def _fail() -> memoryview | None:
    raise AssertionError("a part was taken")


def test_what_was_seen_is_not_sent_again(tier: RespTier, transport: DictTransport) -> None:
    """A second put asks first, and sends again what is gone; so it is after a find."""
    assert store_object(tier, key_of(1), 100) is PutOutcome.STORED
    assert store_object(tier, key_of(1), 100) is PutOutcome.PRESENT
    assert transport.calls == ["set", "exists 1"]

    transport.values.clear()
    assert store_object(tier, key_of(1), 100) is PutOutcome.STORED

    other = RespTier("redis://nowhere", transport=transport)
    other.find([key_of(1), key_of(2)])
    transport.calls.clear()
    assert store_object(other, key_of(1), 100) is PutOutcome.PRESENT
    assert store_object(other, key_of(2), 100) is PutOutcome.STORED
    assert transport.calls == ["exists 1", "set"]


def test_what_is_being_written_is_in_flight(tier: RespTier, transport: DictTransport) -> None:
    """To this process; a second put of the key sends nothing."""
    held, outcomes = HeldParts(content_of(key_of(1), 100)), []
    thread = Thread(target=lambda: outcomes.append(tier.put(key_of(1), held, 100)))
    thread.start()
    try:
        assert held.is_begun.wait(30)

        assert tier.find([key_of(1), key_of(2)]) == [Presence.IN_FLIGHT, Presence.ABSENT]
        assert store_object(tier, key_of(1), 100) is PutOutcome.PRESENT
        assert tier.used_bytes == tier.stats().in_use_bytes == 100 + ROOM_BYTES
    finally:
        held.release()
        thread.join()
    assert outcomes == [PutOutcome.STORED]
    assert transport.calls.count("set") == 1
    assert tier.find([key_of(1)]) == [Presence.PRESENT]


def test_parts_that_raise_are_the_callers_business(tier: RespTier) -> None:
    """The key is free afterwards, and the put counts as failed."""

    def parts() -> Iterator[memoryview]:
        yield memoryview(b"abc")
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        tier.put(key_of(1), parts(), 10)

    assert tier.stats().puts == {"failed": 1}
    assert tier.used_bytes == 0
    assert store_object(tier, key_of(1), 10) is PutOutcome.STORED


def test_times_to_live_go_with_every_write_and_touch(transport: DictTransport) -> None:
    """In milliseconds, and never 0, which a server refuses."""
    tier = RespTier("redis://nowhere", ttl_s=0.0001, transport=transport)
    store_object(tier, key_of(1), 10)
    tier.touch([key_of(1), key_of(2)])
    tier.touch([])

    assert transport.last_set is not None
    assert transport.last_set.ttl_ms == 1
    assert transport.calls == ["set", "touch 2 1"]


def test_names_that_are_no_keys_are_passed_over(tier: RespTier, transport: DictTransport) -> None:
    """Others may use the prefix too; a key that a scan names twice is one object."""
    store_object(tier, key_of(1), 10)
    transport.foreign = [b"kvkeep:", b"kvkeep:hello", b"kvkeep:0A", b"kvkeep:\xff", b"other:00"]

    listed = [item for item in tier.objects() if item.key != b""]

    assert listed == [StoredObject(key_of(1), 10)]


def test_a_broken_scan_gives_what_there_is_and_says_so(
    tier: RespTier, transport: DictTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """No exception, one warning."""
    store_object(tier, key_of(1), 10)
    transport.ping_fault = CallError(MissCause.LATE, "no answer")

    assert list(tier.objects()) == [StoredObject(key_of(1), 10)]
    assert ["no answer" in message for message in caplog.messages] == [True]


def test_what_could_not_be_deleted_is_said(
    tier: RespTier, transport: DictTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """A purge that did not reach its server is no purge."""
    transport.delete_many = lambda keys, deadline: Deleted(0, 0, len(keys))  # type: ignore[method-assign]

    assert tier.delete([key_of(1), key_of(2)]) == 0

    assert ["2 keys were not deleted" in message for message in caplog.messages] == [True]


def test_a_refused_login_is_a_setting(transport: DictTransport) -> None:
    """The error names the url without its password; the connections are closed."""
    transport.ping_fault = SettingError("the login is refused (WRONGPASS no)")

    with pytest.raises(ConfigError, match=r"url='redis://me:\*\*\*@nowhere': the login is refused"):
        RespTier("redis://me:secret@nowhere", transport=transport)

    assert transport.calls == ["close"]


def test_a_silent_server_is_no_error(transport: DictTransport) -> None:
    """The tier is made, and used when the server comes."""
    transport.ping_fault = CallError(MissCause.UNAVAILABLE, "connection refused")

    tier = RespTier("redis://nowhere", transport=transport)

    assert store_object(tier, key_of(1), 10) is PutOutcome.STORED


@pytest.mark.parametrize(
    ("result", "num_warnings"),
    [
        (SetResult(PutOutcome.REFUSED, "OOM command not allowed"), 1),
        (SetResult(PutOutcome.FAILED, "READONLY You can't write"), 1),
        (SetResult(PutOutcome.FAILED, "no answer within 1 s"), 0),
    ],
)
def test_why_nothing_is_taken_is_said_once(
    tier: RespTier,
    transport: DictTransport,
    caplog: pytest.LogCaptureFixture,
    result: SetResult,
    num_warnings: int,
) -> None:
    """What a server that answers says; that one does not answer is for its breaker to say."""
    caplog.set_level(logging.WARNING, "kvkeep")
    transport.set_result = result

    outcomes = {store_object(tier, key_of(number), 10) for number in range(5)}

    assert outcomes == {result.outcome}
    assert len(caplog.messages) == num_warnings


def test_sizes_are_those_of_own_puts_and_deletes(tier: RespTier, transport: DictTransport) -> None:
    """What others put is not counted, and when we delete it nothing gets negative; labels are counted."""
    for number in range(3):
        store_object(tier, key_of(number), 1000)
    assert tier.used_bytes == tier.stats().reusable_bytes == 3 * (1000 + ROOM_BYTES)
    other = RespTier("redis://nowhere", transport=transport)
    assert other.used_bytes == 0

    assert other.delete([key_of(0)]) == 1
    assert tier.delete([key_of(0), key_of(1), key_of(1)]) == 1

    assert other.used_bytes == 0
    assert tier.used_bytes == 2 * (1000 + ROOM_BYTES)
    assert tier.stats().num_objects == 2


def test_gets_beside_each_other_are_all_in_use(tier: RespTier, transport: DictTransport) -> None:
    """In use is what is being moved now."""
    store_object(tier, key_of(1), 1000)
    is_in, may_go = Event(), Event()
    inner = transport.get_into

    def slow(
        key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss:
        is_in.set()
        assert may_go.wait(30)
        return inner(key, views, num_bytes, deadline)

    transport.get_into = slow  # type: ignore[method-assign]
    thread = Thread(target=read_object, args=(tier, key_of(1), 1000))
    thread.start()
    try:
        assert is_in.wait(30)
        assert (tier.stats().in_use_bytes, tier.stats().reusable_bytes) == (1000 + ROOM_BYTES, 0)
    finally:
        may_go.set()
        thread.join()
    assert (tier.stats().in_use_bytes, tier.stats().reusable_bytes) == (0, 1000 + ROOM_BYTES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key_prefix", "a b"), ("key_prefix", "a{b}"), ("key_prefix", "a*"), ("key_prefix", "x" * 201),
        ("ttl_s", 0), ("ttl_s", -1.0), ("ttl_s", float("nan")), ("ttl_s", "1"), ("ttl_s", 1e9),
        ("timeout_s", 0), ("timeout_s", float("inf")), ("timeout_s", True),
        ("num_connections", 0), ("num_connections", 1.5), ("num_connections", True),
        ("max_object_bytes", 0), ("max_object_bytes", MAX_VALUE_BYTES + 1),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(
    transport: DictTransport, field: str, value: object
) -> None:
    """The message names the field and its value; no server is asked."""
    with pytest.raises(ConfigError, match=f"{field}="):
        RespTier("redis://nowhere", transport=transport, **{field: value})  # type: ignore[arg-type]
    assert transport.calls == []
