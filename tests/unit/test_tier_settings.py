"""Tiers as users write them become tiers, or an error that says what to write instead."""

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from kvkeep.config.tier_tables import TierTable, parse_tier, parse_tiers
from kvkeep.errors import ConfigError
from kvkeep.testing.tier_contents import key_of, store_object
from kvkeep.tiers import settings as module
from kvkeep.tiers.base import Occasion, PutOutcome
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.floors import open_floors, tier_names, tier_settings
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.settings import Disk, Host, Remote, TierSettings

# Nobody listens there: a tier opens all the same.
NOBODY = "redis://127.0.0.1:1"


def made(text: str) -> TierSettings:
    """The settings that one tier's text stands for."""
    return tier_settings(parse_tier(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:4GB", Host("4GB")),
        ("host:4000000000", Host(4_000_000_000)),
        ("host:20%?policy=slru", Host("20%", policy="slru")),
        ("host:4GB?name=near&write_on=", Host("4GB", name="near", write_on=())),
        ("disk:~/.cache/kvkeep:50GB", Disk("~/.cache/kvkeep", "50GB")),
        ("disk:/a:b/c:50GB", Disk("/a:b/c", "50GB")),
        (
            "disk:/x:50GB?durable=true&write_on=reused,idle",
            Disk("/x", "50GB", durable=True, write_on=("reused", "idle")),
        ),
        ("redis://h:6379/0", Remote("redis://h:6379/0")),
        ("redis://h?timeout_s=0.5&ttl_s=60", Remote("redis://h", timeout_s=0.5, ttl_s=60.0)),
        ("redis://h?db=1&timeout_s=2", Remote("redis://h?db=1", timeout_s=2.0)),
        ("rediss://u:p%40@h?ca_file=/etc/ca.pem", Remote("rediss://u:p%40@h?ca_file=/etc/ca.pem")),
        ("redis+cluster://a:1,b:2?num_connections=2", Remote("redis+cluster://a:1,b:2", num_connections=2)),
        ("s3://bucket/prefix?region=eu-west-1", Remote("s3://bucket/prefix", region="eu-west-1")),
        ("s3://b?access_key=A&secret_key=S", Remote("s3://b", access_key="A", secret_key="S")),  # noqa: S106  made up
        ("s3://b?max_object_bytes=64MiB&timeout_s=3", Remote("s3://b?max_object_bytes=64MiB", timeout_s=3.0)),
    ],
)  # fmt: skip
def test_text_means_settings(text: str, expected: TierSettings) -> None:
    """Every option is a field of the same name, with the type of the field."""
    assert made(text) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (TierTable("host", {"capacity": "4GB"}), Host("4GB")),
        (
            TierTable("disk", {"folder": "/x", "capacity": 10**9, "durable": True, "write_on": ["idle"]}),
            Disk("/x", 10**9, durable=True, write_on=("idle",)),
        ),
        (
            TierTable("remote", {"url": "redis://h?timeout_s=1", "ttl_s": 60}),
            Remote("redis://h", timeout_s=1.0, ttl_s=60.0),
        ),
    ],
)  # fmt: skip
def test_a_table_means_settings(table: TierTable, expected: TierSettings) -> None:
    """As TOML gives it: lists are tuples, whole numbers may be seconds."""
    assert tier_settings(table) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hots:4GB", "tier='hots:4GB' is none; write host:SIZE"),
        ("hots", "tier='hots' is not known; did you mean host"),
        ("", "tier='' is none"),
        ("host:", "no capacity; write host:4GB"),
        ("host:4GBB", "capacity='4GBB' is not a size"),
        ("host:0", "capacity=0 is not positive"),
        ("host:4GB?polcy=lru", "polcy is no option of the tier; did you mean policy"),
        ("host:4GB?policy=lurk", "policy='lurk' is not known"),
        ("host:4GB?write_on=reusd", "holds 'reusd'; did you mean reused"),
        ("host:4GB?name=device", "name='device' cannot be"),
        ("host:4GB?name", "tier='host:4GB.name': .*write .name=value"),
        ("host:4GB?name=a&name=b", "has name twice"),
        ("disk:/x", "write disk:FOLDER:50GB"),
        ("disk:/x:", "write disk:FOLDER:50GB"),
        ("disk:/x:50GB?durable=maybe", "durable='maybe' is no true or false"),
        ("redos://h", "tier='redos' is not known; did you mean redis"),
        ("redis://h?timeot_s=1", "timeot_s is no option of an address; did you mean timeout_s"),
        ("redis://h?timeout_s=0", "timeout_s=0.0 is no positive number"),
        ("redis://h?timeout_s=nan", "timeout_s=nan is no positive number"),
        ("redis://h?num_connections=1.5", "num_connections='1.5' is no"),
        ("redis://h?region=x", "region means nothing to redis://"),
        ("redis://h:99999", "port 99999"),
        ("s3://b?ttl_s=5", "ttl_s means nothing to s3://"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    """Field, value, and remedy or nearest name."""
    with pytest.raises(ConfigError, match=message):
        made(text)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (Host, {"capacity": True}, "capacity=True"),
        (Host, {"capacity": "1GB", "write_on": "idle"}, "write_on='idle' is no tuple"),
        (Host, {"capacity": "1GB", "name": " "}, "name=' '"),
        (Host, {"capacity": "1GB", "policy": 3}, "policy=3"),
        (Disk, {"folder": "", "capacity": "1GB"}, "folder=''"),
        (Disk, {"folder": 7, "capacity": "1GB"}, "folder=7"),
        (Disk, {"folder": "/x", "capacity": "1GB", "durable": 1}, "durable=1"),
        (Remote, {"url": "host:6379"}, "url='host:6379' is no address"),
        (Remote, {"url": 7}, "url='7' is no address"),
        (Remote, {"url": NOBODY, "num_connections": 2.5}, "num_connections=2.5"),
        (Remote, {"url": NOBODY, "ttl_s": "60"}, "ttl_s='60'"),
        (Remote, {"url": NOBODY, "timeout_s": True}, "timeout_s=True"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_opened(
    settings: Callable[..., object], options: Mapping[str, Any], message: str
) -> None:
    """Python callers learn it from the constructor."""
    with pytest.raises(ConfigError, match=message):
        settings(**options)


def test_two_options_that_say_the_same_thing_are_refused() -> None:
    """An address and its table must not disagree."""
    with pytest.raises(ConfigError, match="ttl_s is there twice"):
        tier_settings(TierTable("remote", {"url": "redis://h?ttl_s=1", "ttl_s": 2}))


def test_secrets_are_never_shown() -> None:
    """Neither settings nor tables nor errors about them have a password in their text."""
    remote = Remote("redis://me:hunter2@h", timeout_s=3)
    store = Remote("s3://b", access_key="hunter2", secret_key="hunter3")  # noqa: S106  made up
    table = parse_tier("redis://me:hunter2@h?ttl_s=1")
    tables = TierTable(
        "remote", {"url": "s3://b", "access_key": "hunter2", "secret_key": "hunter3"}
    )
    with pytest.raises(ConfigError) as caught:
        made("redis://me:hunter2@h?timeot_s=1")
    with pytest.raises(ConfigError) as refused:
        made("redis://me:hunter2@h:99999")

    shown = [
        repr(remote),
        repr(store),
        repr(table),
        repr(tables),
        str(caught.value),
        str(refused.value),
    ]

    assert [text for text in shown if "hunter" in text] == []
    assert repr(remote) == "Remote('redis://me:***@h', timeout_s=3)"
    assert "secret_key='***'" in repr(store)


def test_settings_do_not_change() -> None:
    """They are frozen, equal by value, and take only what names a place by position."""
    host = Host("4GB")

    with pytest.raises(FrozenInstanceError):
        host.capacity = "5GB"  # type: ignore[misc]  # the point of the test
    with pytest.raises(TypeError):
        Host("4GB", "slru")  # type: ignore[call-arg]  # the point of the test
    assert host == Host("4GB")
    assert hash(host) == hash(Host("4GB"))


def test_defaults_write_what_wears_least() -> None:
    """Memory takes everything, a disk what proved useful, a shared store what others may want."""
    occasions = {str(occasion) for occasion in Occasion}

    assert set(Host(1).write_on) == occasions
    assert set(Disk("/x", 4096).write_on) == {"reused", "idle", "evicted", "closing"}
    assert set(Remote(NOBODY).write_on) == {"finished", "reused", "idle", "closing"}


def test_names_are_unique_in_a_stack() -> None:
    """A kind's second tier has a number, and no number is given twice."""
    stack: list[TierSettings] = [
        Host(1),
        Remote(NOBODY),
        Remote(NOBODY),
        Disk("/x", 4096, name="remote-3"),
        Remote(NOBODY),
    ]

    assert tier_names(stack) == ["host", "remote", "remote-2", "remote-3", "remote-4"]
    assert tier_names([]) == []
    with pytest.raises(ConfigError, match="name='a' is given to 2 tiers"):
        tier_names([Host(1, name="a"), Host(2, name="a")])


def test_settings_open_what_they_describe(tmp_path: Path) -> None:
    """Sizes, policies and names arrive; a store that does not answer is no error."""
    floors = open_floors(
        [
            Host("1MiB", policy="slru"),
            Disk(tmp_path / "blocks", "8MiB"),
            Remote(NOBODY, timeout_s=0.2, name="far"),
        ]
    )
    tiers = [floor.tier for floor in floors]
    try:
        assert [type(tier) for tier in tiers] == [HostTier, DiskTier, RespTier]
        assert [tier.name for tier in tiers] == ["host", "disk", "far"]
        assert [tier.capacity_bytes for tier in tiers] == [1 << 20, 8 << 20, None]
        assert [store_object(tier, key_of(1), 1) for tier in tiers[:2]] == [PutOutcome.STORED] * 2
        assert floors[0].write_on == frozenset(Occasion)
        assert floors[1].write_on == frozenset(Occasion) - {Occasion.FINISHED}
    finally:
        for tier in tiers:
            tier.close()


def test_when_one_tier_cannot_be_opened_the_others_are_closed(tmp_path: Path) -> None:
    """Nothing is left half open."""
    opened: list[HostTier] = []

    class Watched:
        """Host memory that remembers what it opened."""

        kind, name, write_on = "watched", None, ()

        def open(self, name: str) -> HostTier:
            """A small one."""
            opened.append(HostTier(1 << 20, name=name))
            return opened[-1]

    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError):
        open_floors([Watched(), Disk(tmp_path / "file", "1GB")])

    assert store_object(opened[0], key_of(1), 1) is PutOutcome.FAILED


def test_a_share_is_of_the_memory_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container that is the container's, not the machine's."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_CGROUP_LIMIT", limit)
    with Host("1%").open() as tier:
        whole = tier.capacity_bytes
    limit.write_text(f"{100 << 20}\n")
    with Host("10%").open() as tier:
        assert tier.capacity_bytes == 10 << 20
    limit.write_text("max\n")
    with Host("1%").open() as tier:
        assert tier.capacity_bytes == whole


def test_a_share_of_a_disk_is_known_before_its_folder_exists(tmp_path: Path) -> None:
    """The file system is that of the nearest folder that does."""
    with Disk(tmp_path / "a" / "b", "1%").open() as tier:
        assert tier.capacity_bytes is not None
        assert tier.capacity_bytes > 0


def test_several_tiers_are_one_text() -> None:
    """Spaces separate them, quotes keep a folder's spaces."""
    tables = parse_tiers("host:4GB 'disk:/my cache:50GB'  redis://h")

    assert [tier_settings(table) for table in tables] == [
        Host("4GB"), Disk("/my cache", "50GB"), Remote("redis://h")
    ]  # fmt: skip
    assert parse_tiers("") == ()
    with pytest.raises(ConfigError, match="close the quote"):
        parse_tiers("'host:4GB")
