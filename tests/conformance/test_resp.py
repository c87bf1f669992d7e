"""RESP servers as tiers: each way to reach one passes the whole suite of tiers."""

import socket
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from kvkeep.testing.tier_contents import content_of, cut, key_of, read_object, store_object
from kvkeep.testing.tier_suite import TierSuite
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome, Tier
from kvkeep.tiers.deadlines import Deadline
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.resp_protocol import encode
from kvkeep.tiers.resp_transport import Patch
from kvkeep.tiers.stored_value import ROOM_BYTES
from tests.servers import RedisServer, make_certificates, redis_cluster

_USER_RULES = (
    "on >pw ~kvkeep-test:* resetchannels -@all +get +set +strlen +unlink +exists +touch +pexpire"
    " +getrange +setrange +eval +scan +ping +hello +client|setname"
)


class RespSuite(TierSuite):
    """A server of its own for each class; each folder is a prefix."""

    url: str
    timeout_s = 20.0

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        prefix = f"kvkeep-test:{crc32(str(folder).encode()):08x}:"
        return RespTier(self.url, key_prefix=prefix, timeout_s=self.timeout_s, num_connections=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that anybody may use, and one user may with a password."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        server.run("ACL", "SETUSER", "tenant", *_USER_RULES.split())
        yield server


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that speaks TLS only."""
    folder = tmp_path_factory.mktemp("tls")
    with RedisServer(folder, tls=make_certificates(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Three masters."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


class TestRespOverTcp(RespSuite):
    """The usual way, version 3 of the protocol."""

    @pytest.fixture(autouse=True)
    def _url(self, server: RedisServer) -> None:
        self.url = server.url


class TestRespOverUnixSocket(RespSuite):
    """The same server without TCP, in another database."""

    @pytest.fixture(autouse=True)
    def _url(self, server: RedisServer) -> None:
        self.url = f"unix://{server.socket_path}?db=1"


class TestRespVersion2WithLeastRights(RespSuite):
    """Version 2, and a user who may do what kvkeep does and nothing else."""

    @pytest.fixture(autouse=True)
    def _url(self, server: RedisServer) -> None:
        self.url = f"valkey://tenant:pw@127.0.0.1:{server.port}/0?protocol=2"


class TestRespOverTls(RespSuite):
    """With an authority of our own."""

    @pytest.fixture(autouse=True)
    def _url(self, tls_server: RedisServer) -> None:
        self.url = tls_server.url


class TestRespCluster(RespSuite):
    """Three masters, of which the address names one."""

    @pytest.fixture(autouse=True)
    def _url(self, cluster: list[RedisServer]) -> None:
        self.url = f"redis+cluster://127.0.0.1:{cluster[1].port}"


class TestGlide(RespSuite):
    """The other transport."""

    @pytest.fixture(autouse=True)
    def _url(self, server: RedisServer) -> None:
        pytest.importorskip("glide_sync")
        self.url = f"{server.url}/2?client=glide"


class TestGlideCluster(RespSuite):
    """The other transport, to the cluster."""

    @pytest.fixture(autouse=True)
    def _url(self, cluster: list[RedisServer]) -> None:
        pytest.importorskip("glide_sync")
        self.url = f"redis+cluster://127.0.0.1:{cluster[0].port}?client=glide"


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_objects_expire_on_the_server(server: RedisServer, client: str) -> None:
    """The time to live is the server's; a touch starts it anew, a get does not."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    url, prefix = f"{server.url}/3?client={client}", f"ttl-{client}:"
    with RespTier(url, key_prefix=prefix, ttl_s=1000, timeout_s=20.0) as tier:
        store_object(tier, key_of(1), 100)
        name = f"{prefix}{key_of(1).hex()}"
        server.run("-n", "3", "PEXPIRE", name, "5000")
        read_object(tier, key_of(1), 100)
        after_get_ms = int(server.run("-n", "3", "PTTL", name))
        tier.touch([key_of(1), key_of(2)])
        after_touch_ms = int(server.run("-n", "3", "PTTL", name))
        server.run("-n", "3", "PEXPIRE", name, "1")
        while server.run("-n", "3", "EXISTS", name) == "1":
            pass

        assert 0 < after_get_ms <= 5000 < after_touch_ms <= 1_000_000
        assert tier.find([key_of(1)]) == [Presence.ABSENT]
        assert store_object(tier, key_of(1), 100) is PutOutcome.STORED


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_an_object_and_its_labels_are_one_key(server: RedisServer, client: str) -> None:
    """One key, so that both expire and are evicted together; other labels leave its time to live alone."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    url, name = f"{server.url}/4?client={client}", f"kvkeep:{key_of(1).hex()}"
    server.run("-n", "4", "FLUSHDB")
    with RespTier(url, timeout_s=20.0, ttl_s=1000) as tier:
        content = memoryview(content_of(key_of(1), 1000))
        tier.put(key_of(1), [content], 1000, b"tags")

        assert server.run("-n", "4", "DBSIZE") == "1"
        assert server.run("-n", "4", "STRLEN", name) == str(1000 + ROOM_BYTES)
        assert server.run("-n", "4", "GETRANGE", name, "1484", "1487") == "tags"
        server.run("-n", "4", "PEXPIRE", name, "5000")
        assert tier.relabel(key_of(1), b"other tags")
        assert 0 < int(server.run("-n", "4", "PTTL", name)) <= 5000
        assert not tier.relabel(key_of(2), b"ghost")
        assert server.run("-n", "4", "DBSIZE") == "1"


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_a_patch_makes_no_value(server: RedisServer, client: str) -> None:
    """Not of a key that is gone, whatever length was thought of; nor into a value of another length."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    server.run("-n", "7", "FLUSHDB")
    server.run("-n", "7", "SET", "there", "0123456789")
    with RespTier(f"{server.url}/7?client={client}", timeout_s=20.0) as tier:
        patches = [
            Patch(b"gone", 0, 0, b"ghost"),
            Patch(b"gone", 10, 6, b"ghost"),
            Patch(b"there", 9, 6, b"wrong"),
            Patch(b"there", 10, 6, b"right"),
        ]

        results = tier._transport.patch_many(patches, Deadline(20.0))

        assert [result.outcome for result in results] == [PutOutcome.REFUSED] * 3 + [
            PutOutcome.STORED
        ]
        assert server.run("-n", "7", "DBSIZE") == "1"
        assert server.run("-n", "7", "GET", "there") == "012345right"


def test_a_user_who_may_not_replace_labels_can_do_all_else(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once; labels of a put are kept."""
    rules = [word for word in _USER_RULES.split() if word not in ("+eval", "+setrange")]
    server.run("ACL", "SETUSER", "reader", *rules)
    url = f"redis://reader:pw@127.0.0.1:{server.port}"
    with RespTier(url, key_prefix="kvkeep-test:reader:", timeout_s=20.0) as tier:
        for number in range(3):
            store_object(tier, key_of(number), 100, b"tag")

        assert not any(tier.relabel(key_of(number), b"other") for number in range(3))
        assert {item.labels for item in tier.labelled()} == {b"tag"}
        assert ["takes no labels" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_values_of_before_are_objects_without_labels(server: RedisServer, client: str) -> None:
    """Short and long ones, beside some that have labels of all lengths."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    url, sizes = f"{server.url}/6?client={client}", [9_700, 300_000, 999_900]
    server.run("-n", "6", "FLUSHDB")
    with (
        RespTier(url, timeout_s=20.0) as tier,
        socket.create_connection(("127.0.0.1", server.port)) as wire,
    ):
        wire.sendall(encode(b"SELECT", b"6"))
        for number, num_bytes in enumerate(sizes):
            name = f"kvkeep:{key_of(number).hex()}".encode()
            wire.sendall(encode(b"SET", name, content_of(key_of(number), num_bytes)))
        while len(list(tier.objects())) < len(sizes):
            pass

        for labels in (b"", b"tag", bytes(2000), bytes(200_000)):
            for number, num_bytes in enumerate(sizes):
                key, buffer = key_of(number), bytearray(num_bytes)
                assert not labels or tier.relabel(key, labels)
                found = tier.get(key, cut(buffer, [num_bytes // 3]))
                assert found == Got(num_bytes, labels)
                assert bytes(buffer) == content_of(key, num_bytes)
        assert {item.num_bytes for item in tier.objects()} == set(sizes)


@pytest.mark.parametrize("kind", ["server", "tls_server"])
def test_connections_are_reused_and_named(kind: str, request: pytest.FixtureRequest) -> None:
    """A hundred calls need one connection, which people see by its name; closing ends it."""
    server: RedisServer = request.getfixturevalue(kind)
    mark = "&" if "?" in server.url else "?"
    tier = RespTier(f"{server.url}{mark}client_name=box-7", timeout_s=20.0)
    before = int(_info(server, "total_connections_received"))
    for number in range(100):
        store_object(tier, key_of(number), 100)
    after = int(_info(server, "total_connections_received"))

    # Those that ask are counted too.
    assert after - before == 1
    assert server.run("CLIENT", "LIST").count("name=box-7 ") == 1
    tier.close()
    while "name=box-7 " in server.run("CLIENT", "LIST"):
        pass


def _info(server: RedisServer, field: str) -> str:
    lines = server.run("INFO", "stats").splitlines()
    return next(line.partition(":")[2] for line in lines if line.startswith(field + ":"))


def test_keys_move_between_nodes_while_they_are_used(tmp_path: Path) -> None:
    """A slot is moved, key by key: redirects of both kinds are followed, and nothing is missed."""
    with redis_cluster(tmp_path, num_nodes=2) as nodes:
        url = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        with RespTier(f"redis+cluster://{url}", timeout_s=20.0) as tier:
            keys = [key_of(number) for number in range(60)]
            for key in keys:
                assert store_object(tier, key, 500) is PutOutcome.STORED
            slot = nodes[0].run("CLUSTER", "KEYSLOT", f"kvkeep:{keys[0].hex()}")
            source, target = sorted(nodes, key=lambda node: int(slot) // 8192 != nodes.index(node))
            ids = [node.run("CLUSTER", "MYID") for node in (source, target)]
            target.run("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            source.run("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            source.run(
                "MIGRATE", "127.0.0.1", str(target.port), f"kvkeep:{keys[0].hex()}", "0", "5000"
            )

            # The node that has the slot sends us on for this one key.
            assert read_object(tier, keys[0], 500) == content_of(keys[0], 500)
            assert tier.find(keys) == [Presence.PRESENT] * 60
            for node in (target, source):
                node.run("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
            assert tier.find(keys) == [Presence.PRESENT] * 60
            assert read_object(tier, keys[0], 500) == content_of(keys[0], 500)
            assert tier.delete(keys) == 60


@pytest.mark.parametrize("client", ["sockets", "glide"])
def test_a_foreign_value_is_corrupt(server: RedisServer, client: str) -> None:
    """A list under one of our keys is no object; it can be deleted and put right."""
    if client == "glide":
        pytest.importorskip("glide_sync")
    url, prefix = f"{server.url}/5?client={client}", f"{client}:"
    with RespTier(url, key_prefix=prefix, timeout_s=20.0) as tier:
        assert server.run("-n", "5", "LPUSH", f"{prefix}{key_of(1).hex()}", "a") == "1"

        found = read_object(tier, key_of(1), 100)

        assert isinstance(found, Miss)
        assert found.cause is MissCause.CORRUPT
        assert tier.delete([key_of(1)]) == 1
        assert store_object(tier, key_of(1), 100) is PutOutcome.STORED
