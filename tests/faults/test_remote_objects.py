"""An object store dies, hangs, is overloaded and cuts its replies off."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome, Tier
from kvkeep.tiers.breaker import BreakerState
from kvkeep.tiers.deadlines import CallError
from kvkeep.tiers.object_store import BucketAddress, open_bucket
from kvkeep.tiers.objects import ObjectTier
from tests.proxies import StoreProxy, store_proxy
from tests.remote_tiers import assert_late_then_left_alone, cause_of
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, RcloneServer, wait_until

pytest.importorskip("obstore")
_TIMEOUT_S = 1.5
_PATIENT_S = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RcloneServer]:
    """A store of its own, which the test may ill-treat."""
    with RcloneServer(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def proxy(server: RcloneServer) -> Iterator[StoreProxy]:
    """What stands before it."""
    with store_proxy(server.port) as proxy:
        yield proxy


def open_tier(
    endpoint: str, timeout_s: float = _PATIENT_S, secret: str = S3_SECRET_KEY
) -> ObjectTier:
    """A tier on a store."""
    return ObjectTier(
        "s3://bucket/cache",
        endpoint=endpoint,
        access_key=S3_ACCESS_KEY,
        secret_key=secret,
        timeout_s=timeout_s,
        num_connections=4,
    )


def has_it(tier: Tier, number: int) -> bool:
    """Whether an object of 1000 bytes is got, with its bytes."""
    return read_object(tier, key_of(number), 1000) == content_of(key_of(number), 1000)


def test_a_store_that_is_killed_in_the_middle_costs_misses_only(server: RcloneServer) -> None:
    """Kill -9 under load: no wrong byte; what was stored before is there when it is back."""
    is_over = Event()

    def hammer(tier: Tier, seed: int) -> int:
        num_got, at = 0, seed
        while not is_over.is_set():
            at += 1
            num_bytes = 1 + at * 7919 % 200_000
            store_object(tier, key_of(at), num_bytes)
            found = read_object(tier, key_of(at), num_bytes)
            if not isinstance(found, Miss):
                assert found == content_of(key_of(at), num_bytes)
                num_got += 1
        return num_got

    with open_tier(server.endpoint) as tier, ThreadPoolExecutor(3) as pool:
        assert store_object(tier, key_of(0), 1000) is PutOutcome.STORED
        works = [pool.submit(hammer, tier, (seed + 1) * 1000) for seed in range(3)]
        try:
            for _ in range(2):
                begun = sum(tier.stats().puts.values())
                wait_until(lambda: sum(tier.stats().puts.values()) > begun + 9, "some puts")  # noqa: B023
                server.kill()
                wait_until(lambda: tier.find([key_of(0)]) == [Presence.ABSENT], "an absence")
                server.start()
                wait_until(lambda: has_it(tier, 0), "an answer")
        finally:
            is_over.set()
        num_got = [work.result() for work in works]
        stats = tier.stats()

    assert min(num_got) > 0
    assert stats.misses[MissCause.UNAVAILABLE] > 0
    assert stats.in_use_bytes == 0


def test_a_store_that_hangs_is_late_then_left_alone_then_used_again(
    server: RcloneServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls are given up at their deadline, though nothing can interrupt them."""
    caplog.set_level(logging.INFO, "kvkeep")
    with open_tier(server.endpoint, _TIMEOUT_S) as tier:
        store_object(tier, key_of(1), 1000)
        server.freeze()
        try:
            assert_late_then_left_alone(tier, _TIMEOUT_S)
        finally:
            server.thaw()
        wait_until(lambda: has_it(tier, 1), "an answer")

    levels = [record.levelno for record in caplog.records if "breaker" in record.name]
    assert levels == [logging.WARNING, logging.INFO]


def test_what_the_client_itself_gives_up_is_late_too(server: RcloneServer) -> None:
    """At the deadline either it or the tier is first to say so."""
    address = BucketAddress(
        url="s3://bucket/cache",
        endpoint=server.endpoint,
        access_key=S3_ACCESS_KEY,
        secret_key=S3_SECRET_KEY,
    )
    bucket = open_bucket(address, 0.5)
    server.freeze()
    try:
        with pytest.raises(CallError) as caught:
            bucket.size_of(key_of(1))
    finally:
        server.thaw()

    assert caught.value.cause is MissCause.LATE


def test_throttling_is_waited_for(proxy: StoreProxy) -> None:
    """Two replies of 503 are tried again within the call."""
    with open_tier(proxy.endpoint) as tier:
        proxy.num_refusals = 2
        assert store_object(tier, key_of(1), 1000) is PutOutcome.STORED
        proxy.num_refusals = 2
        assert has_it(tier, 1)
        proxy.num_refusals = 2
        assert tier.find([key_of(1)]) == [Presence.PRESENT]

        assert proxy.num_refused == 6
        assert tier.stats().misses == {}


def test_a_store_that_is_overloaded_for_long_is_left_alone(proxy: StoreProxy) -> None:
    """Unavailable, and after some calls not asked at all; then it is used again."""
    with open_tier(proxy.endpoint, 2.0) as tier:
        store_object(tier, key_of(1), 1000)
        proxy.num_refusals = 10**9
        for _ in range(3):
            assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
        assert [stats.state for stats in tier.breakers] == [BreakerState.OPEN]
        num_refused = proxy.num_refused
        for _ in range(5):
            assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
        assert proxy.num_refused - num_refused < 5
        proxy.num_refusals = 0

        wait_until(lambda: has_it(tier, 1), "an answer")


def test_a_slow_store_is_late(proxy: StoreProxy) -> None:
    """And who was given up writes no buffer later."""
    with open_tier(proxy.endpoint, _TIMEOUT_S) as tier:
        store_object(tier, key_of(1), 1000)
        proxy.delay_s = _TIMEOUT_S * 1.2
        buffer = bytearray(b"\xaa" * 1000)

        found = tier.get(key_of(1), [memoryview(buffer)])

        assert isinstance(found, Miss)
        assert found.cause is MissCause.LATE
        proxy.delay_s = 0.0
        wait_until(lambda: has_it(tier, 1), "an answer")
        assert buffer == b"\xaa" * 1000


def test_a_reply_that_is_cut_off_is_a_miss(proxy: StoreProxy) -> None:
    """Unless the rest comes by another request: never are half of the bytes taken for all."""
    with open_tier(proxy.endpoint, 4.0) as tier:
        store_object(tier, key_of(1), 100_000)
        proxy.max_body_bytes = 10
        found = read_object(tier, key_of(1), 100_000)
        proxy.max_body_bytes = None

        assert cause_of(found) in (MissCause.UNAVAILABLE, MissCause.LATE)
        wait_until(
            lambda: read_object(tier, key_of(1), 100_000) == content_of(key_of(1), 100_000), "it"
        )


def test_a_store_that_is_not_there_yet_is_used_when_it_comes(
    server: RcloneServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The constructor does not fail; one warning names the store."""
    server.kill()
    with open_tier(server.endpoint, _TIMEOUT_S) as tier:
        assert tier.find([key_of(1)]) == [Presence.ABSENT]
        assert store_object(tier, key_of(1), 1000) is PutOutcome.FAILED
        assert ["s3://bucket/cache" in message for message in caplog.messages] == [True]
        server.start()

        wait_until(
            lambda: store_object(tier, key_of(1), 1000) is PutOutcome.STORED and has_it(tier, 1),
            "an answer",
        )


def test_a_bucket_that_vanishes_costs_misses_only(
    server: RcloneServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Gets are absences, puts fail; when it is there again they work."""
    with open_tier(server.endpoint) as tier:
        store_object(tier, key_of(1), 1000)
        bucket = server.path_of("bucket", "cache").parent
        server.kill()
        bucket.rename(bucket.with_name("elsewhere"))
        server.start()

        assert isinstance(read_object(tier, key_of(1), 1000), Miss)
        assert store_object(tier, key_of(2), 1000) is PutOutcome.FAILED
        for _ in range(3):
            assert tier.find([key_of(number) for number in range(50)]) == [Presence.ABSENT] * 50
        assert "no such bucket" in caplog.text
        server.kill()
        bucket.with_name("elsewhere").rename(bucket)
        server.start()
        wait_until(lambda: has_it(tier, 1), "an answer")
        wait_until(lambda: store_object(tier, key_of(2), 1000) is PutOutcome.STORED, "a put")
