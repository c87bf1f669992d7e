"""Nodes of a cluster die, hang and are replaced: their keys miss, and nobody else's."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.resp import RespTier
from tests.servers import RedisServer, redis_cluster, wait_until

_PATIENT_S = 20.0
_KEYS = [key_of(number) for number in range(60)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Three masters without replicas."""
    with redis_cluster(tmp_path) as nodes:
        yield nodes


def url_of(nodes: list[RedisServer]) -> str:
    """All of them, so that any may be missing."""
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def keys_on(node: RedisServer) -> set[StoredKey]:
    """The keys that a node holds."""
    names = node.run("KEYS", "*").split()
    return {StoredKey(bytes.fromhex(name.partition(":")[2])) for name in names}


def has_replica(node: RedisServer, master_id: str) -> bool:
    """Whether a node knows that the master has one."""
    return f"slave {master_id}" in node.run("CLUSTER", "NODES")


def fill(tier: RespTier) -> None:
    """Put all keys."""
    for key in _KEYS:
        assert store_object(tier, key, 1000) is PutOutcome.STORED


def test_a_node_that_is_killed_takes_its_own_keys_only(nodes: list[RedisServer]) -> None:
    """The others are found and got meanwhile; back again, and empty, it takes new ones."""
    with RespTier(url_of(nodes), timeout_s=_PATIENT_S) as tier:
        fill(tier)
        lost = keys_on(nodes[1])
        assert 5 < len(lost) < 40
        nodes[1].kill()

        expected = [Presence.ABSENT if key in lost else Presence.PRESENT for key in _KEYS]
        assert tier.find(_KEYS) == expected
        for key in _KEYS:
            found = read_object(tier, key, 1000)
            if key in lost:
                assert isinstance(found, Miss)
                assert found.cause is MissCause.UNAVAILABLE
                assert store_object(tier, key, 1000) is PutOutcome.FAILED
            else:
                assert found == content_of(key, 1000)
        assert tier.stats().misses == {MissCause.UNAVAILABLE: len(lost)}
        assert {item.key for item in tier.objects()} == set(_KEYS) - lost

        nodes[1].start()
        key = min(lost)
        wait_until(lambda: store_object(tier, key, 1000) is PutOutcome.STORED, "a put")
        assert read_object(tier, key, 1000) == content_of(key, 1000)
        assert tier.delete(_KEYS) == len(_KEYS) - len(lost) + 1


def test_a_node_that_hangs_delays_and_hides_nobody_else(nodes: list[RedisServer]) -> None:
    """One find asks all nodes at once: what the others say counts, though it waits for the one."""
    with RespTier(url_of(nodes), timeout_s=1.0) as tier:
        fill(tier)
        # The one that is asked first: to connect to it anew takes all the time that it is given.
        frozen = min(nodes, key=lambda node: str(node.port))
        lost = keys_on(frozen)
        expected = [Presence.ABSENT if key in lost else Presence.PRESENT for key in _KEYS]
        frozen.freeze()
        try:
            for _ in range(5):
                assert tier.find(_KEYS) == expected
        finally:
            frozen.thaw()

        wait_until(lambda: tier.find(_KEYS) == [Presence.PRESENT] * len(_KEYS), "all of them")


def test_a_replica_that_takes_over_is_found(tmp_path: Path) -> None:
    """The master dies, its replica is elected: the same keys are there again, without a restart."""
    with (
        redis_cluster(tmp_path) as nodes,
        RedisServer(tmp_path / "replica", is_cluster_node=True) as replica,
        RespTier(url_of(nodes), timeout_s=_PATIENT_S) as tier,
    ):
        fill(tier)
        lost = keys_on(nodes[0])
        place = (str(replica.port), str(replica.bus_port))
        nodes[1].run("CLUSTER", "MEET", "127.0.0.1", *place)
        master_id = nodes[0].run("CLUSTER", "MYID")
        wait_until(lambda: master_id in replica.run("CLUSTER", "NODES"), "a meeting")
        wait_until(lambda: replica.run("CLUSTER", "REPLICATE", master_id) == "OK", "a replica")
        wait_until(lambda: "master_link_status:up" in replica.run("INFO", "replication"), "a copy")
        # All have to know each other before they can elect.
        wait_until(lambda: " 0-5460" in replica.run("CLUSTER", "NODES"), "its slots")
        for node in nodes:
            wait_until(partial(has_replica, node, master_id), "a known replica")
        nodes[0].kill()
        # While no node says so yet its keys are absent, or unavailable.
        tier.find(_KEYS)

        wait_until(lambda: tier.find(_KEYS) == [Presence.PRESENT] * len(_KEYS), "all of them")

        for key in lost:
            assert read_object(tier, key, 1000) == content_of(key, 1000)


def test_a_cluster_that_is_not_there_yet_is_used_when_it_comes(tmp_path: Path) -> None:
    """Nothing but absences until a node answers."""
    with redis_cluster(tmp_path) as nodes:
        for node in nodes:
            node.kill()
        with RespTier(url_of(nodes), timeout_s=_PATIENT_S) as tier:
            assert tier.find(_KEYS) == [Presence.ABSENT] * len(_KEYS)
            assert store_object(tier, _KEYS[0], 1000) is PutOutcome.FAILED
            for node in nodes:
                node.start()

            wait_until(lambda: store_object(tier, _KEYS[0], 1000) is PutOutcome.STORED, "a put")
            assert read_object(tier, _KEYS[0], 1000) == content_of(_KEYS[0], 1000)


def test_the_wrong_kind_of_address_says_which_is_right(
    nodes: list[RedisServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster's node without +cluster, and a single server with it."""
    with RespTier(f"redis://127.0.0.1:{nodes[0].port}", timeout_s=_PATIENT_S) as tier:
        outcomes = {store_object(tier, key, 10) for key in _KEYS}
        assert PutOutcome.FAILED in outcomes
        assert "redis+cluster://" in caplog.text
    with (
        RedisServer(tmp_path / "single") as single,
        pytest.raises(ConfigError, match=r"is no cluster; write redis://"),
    ):
        RespTier(f"redis+cluster://127.0.0.1:{single.port}", timeout_s=_PATIENT_S)
