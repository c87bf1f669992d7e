"""An object store as a tier passes the whole suite of tiers."""

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from kvkeep.errors import ConfigError
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.testing.tier_suite import TierSuite
from kvkeep.tiers.base import (
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
    Tier,
)
from kvkeep.tiers.objects import ObjectTier
from kvkeep.tiers.trailer import encode_tail
from tests.proxies import store_proxy
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, RcloneServer

obstore = pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """A store with one bucket."""
    with RcloneServer(tmp_path_factory.mktemp("s3")) as server:
        yield server


def open_tier(server: RcloneServer, prefix: str, **options: object) -> ObjectTier:
    """A tier under a prefix of the bucket."""
    return ObjectTier(
        f"s3://bucket/{prefix}",
        endpoint=server.endpoint,
        access_key=S3_ACCESS_KEY,
        secret_key=S3_SECRET_KEY,
        timeout_s=30.0,
        **options,  # type: ignore[arg-type]
    )


class TestObjectTier(TierSuite):
    """A prefix of the bucket for each folder."""

    @pytest.fixture(autouse=True)
    def _server(self, server: RcloneServer) -> None:
        self.server = server

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        return open_tier(self.server, f"{crc32(str(folder).encode()):08x}")


def test_an_object_is_one_object_of_the_store(server: RcloneServer) -> None:
    """What other tools see under prefix and key are the object's bytes; what is not ours is passed over."""
    with open_tier(server, "plain/deep") as tier:
        store_object(tier, key_of(1), 1000)
        path = server.path_of("bucket", f"plain/deep/{key_of(1).hex()}")
        path.with_name("README").write_bytes(b"not ours")

        assert path.read_bytes() == content_of(key_of(1), 1000)
        assert list(tier.objects()) == [StoredObject(key_of(1), 1000)]


def test_labels_are_behind_the_object(server: RcloneServer) -> None:
    """In the same object of the store; the lengths that are listed are those without them."""
    with open_tier(server, "labels", num_connections=2) as tier:
        for number in range(100):
            store_object(tier, key_of(number), number, b"tag" * (number % 3) ** 9)
        path = server.path_of("bucket", f"labels/{key_of(8).hex()}")

        assert path.read_bytes() == content_of(key_of(8), 8) + encode_tail(8, b"tag" * 512)
        expected = {
            Labelled(key_of(number), number, b"tag" * (number % 3) ** 9) for number in range(100)
        }
        assert set(tier.labelled()) == expected
        assert {item.num_bytes for item in tier.objects()} == set(range(100))
        assert tier.find([key_of(1)]) == [Presence.PRESENT]
        assert not tier.relabel(key_of(1), b"other")


def test_only_the_ends_of_objects_are_read_for_labels(server: RcloneServer) -> None:
    """Of a megabyte each some hundred bytes; more only where labels are longer."""
    with (
        store_proxy(server.port) as proxy,
        ObjectTier(
            "s3://bucket/ends",
            endpoint=proxy.endpoint,
            access_key=S3_ACCESS_KEY,
            secret_key=S3_SECRET_KEY,
            timeout_s=30.0,
        ) as tier,
    ):
        labels = [b"", b"tag", bytes(488), bytes(489), bytes(20_000)]
        for number, some in enumerate(labels):
            store_object(tier, key_of(number), 1_000_000, some)
        before = proxy.num_body_bytes

        assert [tier.labels(key_of(number)) for number in range(5)] == labels
        assert {item.labels for item in tier.labelled()} == set(labels)
        assert {item.num_bytes for item in tier.objects()} == {1_000_000}

        assert proxy.num_body_bytes - before < 60_000


def test_many_keys_are_found_by_listing_or_one_by_one(server: RcloneServer) -> None:
    """Both ways say the same."""
    with open_tier(server, "many", num_connections=2) as tier:
        keys = [key_of(number) for number in range(40)]
        for key in keys[::2]:
            store_object(tier, key, 10)
        expected = [Presence.PRESENT, Presence.ABSENT] * 20

        assert tier.find(keys) == expected
        assert [tier.find([key])[0] for key in keys] == expected


def test_what_is_too_large_is_refused_before_it_is_looked_at(server: RcloneServer) -> None:
    """No part is taken."""

    def fail() -> memoryview | None:
        raise AssertionError("a part was taken")

    with ObjectTier(
        "s3://bucket/large?max_object_bytes=1KB",
        endpoint=server.endpoint,
        access_key=S3_ACCESS_KEY,
        secret_key=S3_SECRET_KEY,
    ) as tier:
        assert tier.put(key_of(1), iter(fail, None), 1001) is PutOutcome.REFUSED
        assert store_object(tier, key_of(1), 1000) is PutOutcome.STORED


def test_a_bucket_that_is_too_long_to_list_is_asked_key_by_key(tmp_path: Path) -> None:
    """Thirty-two keys are worth two pages at the most; which way was taken is not to be seen."""
    server = RcloneServer(tmp_path)
    keys = [key_of(number) for number in range(32)]
    folder = server.path_of("bucket", "long")
    folder.mkdir()
    for number in [*range(0, 32, 2), *range(1000, 4000)]:
        (folder / key_of(number).hex()).write_bytes(b"")
    with server, open_tier(server, "long", num_connections=8) as tier:
        for _ in range(2):
            assert tier.find(keys) == [Presence.PRESENT, Presence.ABSENT] * 16


@pytest.mark.parametrize("num_bytes", [0, 99, 101])
def test_an_object_that_was_replaced_is_short(server: RcloneServer, num_bytes: int) -> None:
    """Another length is noticed before its bytes are asked for."""
    with open_tier(server, f"replaced{num_bytes}") as tier:
        store_object(tier, key_of(1), 100)
        other = obstore.store.S3Store(
            "bucket",
            endpoint=server.endpoint,
            access_key_id=S3_ACCESS_KEY,
            secret_access_key=S3_SECRET_KEY,
            client_options={"allow_http": True},
        )
        other.put(f"replaced{num_bytes}/{key_of(1).hex()}", bytes(num_bytes))

        found = read_object(tier, key_of(1), 100)

        assert isinstance(found, Miss)
        assert found.cause is MissCause.SHORT
        assert tier.delete([key_of(1)]) == 1
        assert store_object(tier, key_of(1), 100) is PutOutcome.STORED


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("http://bucket", {}, "no bucket"),
        ("s3:///prefix", {}, "no bucket"),
        ("s3://key:secret@bucket", {}, "no bucket"),
        ("s3://bucket?max_object_byte=1", {}, "did you mean max_object_bytes"),
        ("s3://bucket?max_object_bytes=x", {}, "max_object_bytes='x' is not a size"),
        ("s3://bucket", {"secret_key": None}, "secret_key=None"),
        ("s3://bucket", {"endpoint": "127.0.0.1"}, "endpoint=.*write https"),
        ("s3://bucket", {"timeout_s": 0}, "timeout_s=0"),
        ("s3://bucket", {"num_connections": 0}, "num_connections=0"),
        ("s3://nobodys", {}, "no such bucket .*; create it"),
        ("s3://bucket", {"secret_key": "wrong-secret"}, "account is refused.*secret_key"),
        ("s3://bucket", {"access_key": "nobodyatall"}, "account is refused.*access_key"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    server: RcloneServer, url: str, options: dict[str, object], message: str
) -> None:
    """With what is wrong and what to do about it; secrets are not in it."""
    given = {
        "endpoint": server.endpoint,
        "access_key": S3_ACCESS_KEY,
        "secret_key": S3_SECRET_KEY,
        **options,
    }
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        ObjectTier(url, **given)  # type: ignore[arg-type]

    assert S3_SECRET_KEY not in str(caught.value)


def test_without_obstore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional."""
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)

    with pytest.raises(ConfigError, match=r"pip install 'kvkeep\[s3\]'"):
        ObjectTier("s3://bucket")
