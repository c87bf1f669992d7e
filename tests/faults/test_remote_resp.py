"""Redis dies, hangs, dawdles and lies: gets miss with the right cause, and work again when it is well."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import HeldParts, content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome, Tier
from kvkeep.tiers.breaker import BreakerState
from kvkeep.tiers.resp import RespTier
from tests.proxies import wire_proxy
from tests.remote_tiers import assert_late_then_left_alone, cause_of, works_again
from tests.servers import RedisServer, wait_until

# Long for a loopback, even on a busy machine; short for who waits for a test.
_TIMEOUT_S = 0.6
_PATIENT_S = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of its own, which the test may ill-treat."""
    with RedisServer(tmp_path / "redis", "--maxmemory", "30mb") as server:
        yield server


def is_got(tier: Tier, key: StoredKey) -> bool:
    """Whether an object of 100,000 bytes comes, which must be the right ones."""
    found = read_object(tier, key, 100_000)
    assert isinstance(found, Miss) or found == content_of(key, 100_000)
    return not isinstance(found, Miss)


def test_a_server_that_is_killed_in_the_middle_costs_misses_only(server: RedisServer) -> None:
    """Kill -9 under full load, three times: no wrong byte, no exception, and it goes on by itself."""
    is_over = Event()

    def hammer(tier: Tier, seed: int) -> int:
        num_got, at = 0, seed
        while not is_over.is_set():
            at += 1
            key, num_bytes = key_of(at % 100), 1 + at % 100 * 2003
            store_object(tier, key, num_bytes)
            found = read_object(tier, key, num_bytes)
            if not isinstance(found, Miss):
                assert found == content_of(key, num_bytes)
                num_got += 1
        return num_got

    with RespTier(server.url, timeout_s=_PATIENT_S) as tier, ThreadPoolExecutor(4) as pool:
        works = [pool.submit(hammer, tier, seed * 1000) for seed in range(4)]
        try:
            for _ in range(3):
                begun = sum(tier.stats().puts.values())
                wait_until(lambda: sum(tier.stats().puts.values()) > begun + 20, "some puts")  # noqa: B023
                server.kill()
                wait_until(lambda: tier.find([key_of(1)]) == [Presence.ABSENT], "an absence")
                server.start()
                wait_until(lambda: works_again(tier), "an answer")
        finally:
            is_over.set()
        num_got = [work.result() for work in works]
        stats = tier.stats()

    assert min(num_got) > 0
    assert set(stats.misses) <= {MissCause.UNAVAILABLE, MissCause.ABSENT}
    assert stats.misses[MissCause.UNAVAILABLE] > 0
    assert stats.puts[PutOutcome.FAILED] > 0
    assert stats.in_use_bytes == 0


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_a_server_that_hangs_is_late_then_left_alone_then_used_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture, client: str
) -> None:
    """SIGSTOP: some calls wait until their deadline, the next ones do not wait; SIGCONT: it is back."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    caplog.set_level(logging.INFO, "kvkeep.tiers.breaker")
    with RespTier(f"{server.url}?client={client}", timeout_s=_TIMEOUT_S) as tier:
        assert works_again(tier, 1)
        server.freeze()
        try:
            assert_late_then_left_alone(tier, _TIMEOUT_S)
            assert tier.delete([key_of(1)]) == 0
        finally:
            server.thaw()
        wait_until(lambda: works_again(tier, 3), "an answer")

        assert tier.stats().misses[MissCause.LATE] >= 3
        assert [stats.state for stats in tier.breakers] == [BreakerState.CLOSED]
    levels = [record.levelno for record in caplog.records if "breaker" in record.name]
    assert levels == [logging.WARNING, logging.INFO]


def test_a_put_to_a_server_that_hangs_fails(server: RedisServer) -> None:
    """More bytes than the wire takes by itself: sending has the deadline too."""
    with RespTier(server.url, timeout_s=_TIMEOUT_S) as tier:
        server.freeze()
        try:
            assert store_object(tier, key_of(1), 20_000_000) is PutOutcome.FAILED
        finally:
            server.thaw()
        wait_until(lambda: works_again(tier), "an answer")

        assert cause_of(read_object(tier, key_of(1), 20_000_000)) is MissCause.ABSENT


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_a_server_that_is_not_there_yet_is_used_when_it_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, client: str
) -> None:
    """The constructor does not fail, and one warning says what is missing."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    caplog.set_level(logging.INFO, "kvkeep")
    server = RedisServer(tmp_path / "redis")
    timeout_s = _PATIENT_S if client == "sockets" else _TIMEOUT_S
    with RespTier(f"{server.url}?client={client}", timeout_s=timeout_s) as tier:
        assert tier.find([key_of(1)]) == [Presence.ABSENT]
        assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
        assert store_object(tier, key_of(1), 1000) is PutOutcome.FAILED
        assert "is left alone" in caplog.text

        with server:
            wait_until(lambda: works_again(tier), "an answer")
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_a_server_that_hangs_at_the_start_is_no_error(server: RedisServer) -> None:
    """The constructor waits no longer than any call."""
    server.freeze()
    try:
        tier = RespTier(server.url, timeout_s=_TIMEOUT_S)
        assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
    finally:
        server.thaw()
    with tier:
        wait_until(lambda: works_again(tier), "an answer")


def test_a_restart_is_absence(server: RedisServer) -> None:
    """Connections of before are dead and nobody notices: the first calls after it are answered."""
    with RespTier(server.url, timeout_s=_PATIENT_S) as tier:
        for number in range(10):
            store_object(tier, key_of(number), 1000)
        server.kill()
        server.start()

        assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.ABSENT
        assert tier.find([key_of(number) for number in range(10)]) == [Presence.ABSENT] * 10
        assert store_object(tier, key_of(1), 1000) is PutOutcome.STORED
        assert tier.stats().misses == {MissCause.ABSENT: 1}


def test_connections_that_the_server_closed_are_not_used(server: RedisServer) -> None:
    """A server that closes idle connections costs nothing."""
    with RespTier(server.url, timeout_s=_PATIENT_S) as tier:
        assert works_again(tier)
        for _ in range(5):
            server.run("CLIENT", "KILL", "TYPE", "normal")
            assert not isinstance(read_object(tier, key_of(999), 1000), Miss)

        assert tier.stats().misses == {}


def test_a_slow_wire_is_late_for_what_is_large(server: RedisServer) -> None:
    """A value that cannot come in time is late; small ones come, and large ones when it is fast again."""
    with wire_proxy(server.port) as wire:
        url = f"redis://127.0.0.1:{wire.port}"
        with RespTier(url, timeout_s=_TIMEOUT_S) as tier:
            large, small = key_of(1), key_of(2)
            store_object(tier, large, 1_000_000)
            store_object(tier, small, 100)
            wire.bytes_per_s = 100_000

            assert cause_of(read_object(tier, large, 1_000_000)) is MissCause.LATE
            assert read_object(tier, small, 100) == content_of(small, 100)
            wire.bytes_per_s = None
            wait_until(
                lambda: read_object(tier, large, 1_000_000) == content_of(large, 1_000_000), "it"
            )

            assert tier.stats().misses[MissCause.LATE] >= 1


@pytest.mark.parametrize("max_bytes", [200, 3000, 50_000])
def test_a_wire_that_is_cut_in_a_value_is_a_miss(server: RedisServer, max_bytes: int) -> None:
    """The rest of a half-read value is never taken for the next reply."""
    with wire_proxy(server.port) as wire:
        with RespTier(f"redis://127.0.0.1:{wire.port}", timeout_s=_PATIENT_S) as tier:
            for number in range(4):
                store_object(tier, key_of(number), 100_000)
            wire.max_bytes = max_bytes
            # Also connections of before end, after so many bytes more.
            causes = {cause_of(read_object(tier, key_of(at), 100_000)) for at in range(2)}
            wire.max_bytes = None

            for key in map(key_of, range(4)):
                wait_until(partial(is_got, tier, key), "it")
        assert causes == {MissCause.UNAVAILABLE}


def test_callers_that_wait_for_a_connection_are_late_themselves(server: RedisServer) -> None:
    """One connection, held by a put whose bytes are still being made: that is no fault of the server."""
    held = HeldParts(content_of(key_of(1), 1000))
    with (
        RespTier(server.url, timeout_s=_TIMEOUT_S, num_connections=1) as tier,
        ThreadPoolExecutor(1) as pool,
    ):
        put = pool.submit(tier.put, key_of(1), held, 1000)
        try:
            assert held.is_begun.wait(_PATIENT_S)
            for _ in range(5):
                found = read_object(tier, key_of(2), 1000)
                assert isinstance(found, Miss)
                assert (found.cause, "busy" in found.reason) == (MissCause.LATE, True)
        finally:
            held.release()
        # Who makes the bytes has taken longer than a call may, and the server has not.
        assert put.result() is PutOutcome.STORED
        assert [stats.state for stats in tier.breakers] == [BreakerState.CLOSED]
        assert read_object(tier, key_of(1), 1000) == content_of(key_of(1), 1000)


def test_more_callers_than_connections_are_served_in_turn(server: RedisServer) -> None:
    """Six threads in a hurry share one connection, and none of them waits in vain."""
    with RespTier(server.url, timeout_s=3.0, num_connections=1) as tier:
        store_object(tier, key_of(1), 1000)

        def read() -> None:
            buffer = bytearray(1000)
            for _ in range(1500):
                assert tier.get(key_of(1), [memoryview(buffer)]) == Got(1000)

        with ThreadPoolExecutor(6) as pool:
            for work in [pool.submit(read) for _ in range(6)]:
                work.result()


def test_what_the_server_evicts_is_absent(server: RedisServer) -> None:
    """The memory of 30 MB holds no 60 objects of 1 MB."""
    server.run("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with RespTier(server.url, timeout_s=_PATIENT_S) as tier:
        keys = [key_of(number) for number in range(60)]
        for key in keys:
            assert store_object(tier, key, 1_000_000) is PutOutcome.STORED
        there = [found is Presence.PRESENT for found in tier.find(keys)]

        assert 10 < sum(there) < 40
        for key, is_there in zip(keys, there, strict=True):
            found = read_object(tier, key, 1_000_000)
            if is_there:
                assert found == content_of(key, 1_000_000)
            else:
                assert cause_of(found) is MissCause.ABSENT


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_a_full_server_refuses_and_goes_on_serving(
    server: RedisServer, caplog: pytest.LogCaptureFixture, client: str
) -> None:
    """Without eviction there is no room for more: refused, said once, and gets are not concerned."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    with RespTier(f"{server.url}?client={client}", timeout_s=_PATIENT_S) as tier:
        outcomes = [store_object(tier, key_of(number), 1_000_000) for number in range(60)]

        assert set(outcomes) == {PutOutcome.STORED, PutOutcome.REFUSED}
        assert outcomes[-1] is PutOutcome.REFUSED
        assert read_object(tier, key_of(0), 1_000_000) == content_of(key_of(0), 1_000_000)
        assert tier.stats().puts[PutOutcome.REFUSED] == outcomes.count(PutOutcome.REFUSED)
        assert [stats.state for stats in tier.breakers] == [BreakerState.CLOSED]
        assert ["OOM" in message for message in caplog.messages] == [True]
        tier.delete([key_of(number) for number in range(60)])
        assert store_object(tier, key_of(0), 1_000_000) is PutOutcome.STORED


def test_a_server_that_may_not_be_written_to_can_be_read(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica answers gets; its puts fail, which is said once."""
    with RespTier(server.url, timeout_s=_PATIENT_S) as tier:
        store_object(tier, key_of(1), 1000)
        server.run("REPLICAOF", "127.0.0.1", "1")

        assert {store_object(tier, key_of(at), 1000) for at in (2, 3, 4, 5)} == {PutOutcome.FAILED}
        assert read_object(tier, key_of(1), 1000) == content_of(key_of(1), 1000)
        assert ["READONLY" in message for message in caplog.messages] == [True]
        server.run("REPLICAOF", "NO", "ONE")
        assert store_object(tier, key_of(2), 1000) is PutOutcome.STORED


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1001, 70_000, 3_000_000])
def test_a_value_of_another_length_is_short(server: RedisServer, num_bytes: int) -> None:
    """Somebody replaced it: the caller's buffer is not overrun, and the next call is in step."""
    with RespTier(server.url, timeout_s=_PATIENT_S, num_connections=1) as tier:
        store_object(tier, key_of(1), 1000)
        store_object(tier, key_of(2), 1000)
        name = f"kvkeep:{key_of(1).hex()}"
        server.run("DEL", name)
        server.run("SETRANGE", name, str(max(0, num_bytes - 1)), "x" if num_bytes else "")
        if not num_bytes:
            server.run("SET", name, "")
        guarded = bytearray(b"\xaa" * 3000)

        for _ in range(3):
            found = tier.get(key_of(1), [memoryview(guarded)[1000:2000]])
            assert isinstance(found, Miss)
            assert found.cause is MissCause.SHORT
            assert read_object(tier, key_of(2), 1000) == content_of(key_of(2), 1000)

        assert guarded[:1000] == guarded[2000:] == b"\xaa" * 1000
        assert tier.stats().misses == {MissCause.SHORT: 3}


def test_closing_beside_calls_ends_them_quietly(server: RedisServer) -> None:
    """Threads that are in the middle get misses, and no connection stays."""
    tier = RespTier(f"{server.url}?client_name=closing", timeout_s=_PATIENT_S)
    store_object(tier, key_of(1), 1_000_000)
    is_over = Event()

    def read() -> None:
        while not is_over.is_set():
            found = read_object(tier, key_of(1), 1_000_000)
            assert isinstance(found, Miss) or found == content_of(key_of(1), 1_000_000)

    with ThreadPoolExecutor(4) as pool:
        works = [pool.submit(read) for _ in range(4)]
        wait_until(lambda: "name=closing" in server.run("CLIENT", "LIST"), "a connection")
        tier.close()
        wait_until(lambda: tier.stats().misses.get(MissCause.UNAVAILABLE, 0) > 100, "misses")
        is_over.set()
        for work in works:
            work.result()

    wait_until(lambda: "name=closing" not in server.run("CLIENT", "LIST"), "no connection")
