"""Lifetimes of blocks in a real server that machines share; each cache stands for a machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.cache import PinId
from kvkeep.config import CacheOptions
from tests.machines import Machines
from tests.servers import RedisServer

PROMPT = list(range(100, 112))  # three full blocks


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for all tests of this file."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def machines(server: RedisServer, tmp_path: Path) -> Iterator[Machines]:
    """None yet."""
    machines = Machines(server, f"kvkeep-test:{tmp_path.name}:")
    yield machines
    machines.close()


def test_another_machine_obeys_the_life_that_the_first_gave(machines: Machines) -> None:
    """It loads what is alive, keeps its labels, and computes what has expired by then."""
    first, second = machines.start(), machines.start()
    first.serve(PROMPT, CacheOptions(ttl=10, tags=["t"], ttl_counts_from="first"))
    first.cache.offload()
    assert machines.num_objects() == 3

    assert second.serve([*PROMPT, 1], CacheOptions(write=False)) == 1
    labels = second.lifetimes.register.get(second.chain(PROMPT).keys[0])
    assert labels is not None
    assert labels.tags == {"t"}

    machines.clock.now_s += 10
    third = machines.start()
    assert third.serve([*PROMPT, 2], CacheOptions()) == 13


def test_clocks_may_differ(machines: Machines) -> None:
    """What comes from the server ends early by as much as clocks may differ."""
    first, second = machines.start(), machines.start(max_clock_skew_s=4.0)
    first.serve(PROMPT, CacheOptions(ttl=10))
    first.cache.offload()
    machines.clock.now_s += 6

    assert second.serve([*PROMPT, 1], CacheOptions()) == 13
    assert first.serve([*PROMPT, 2], CacheOptions()) == 1


def test_a_purge_finds_what_other_machines_have_put(machines: Machines) -> None:
    """By tag, by tenant and altogether, with pinned ones spared unless they are meant."""
    first, second = machines.start(), machines.start()
    first.serve(PROMPT, CacheOptions(tags=["t"]))
    first.serve([1] * 12, CacheOptions(salt="x"))
    first.serve([2] * 12, CacheOptions())
    first.admin.pin(PinId("p"), first.chain([2] * 12))
    first.cache.offload()
    first.cache.poll()
    first.settle()
    assert machines.num_objects() == 9

    by_tag = second.admin.purges.purge(second.query(tags=("t",)))
    by_tenant = second.admin.purges.purge(second.query(salts=("x",)))
    rest = second.admin.purges.purge(second.query(everything=True))

    assert (by_tag.deleted, sum(by_tag.stored.values())) == (3, 3)
    assert by_tenant.deleted == 3
    assert rest.deleted == 0
    assert machines.num_objects() == 3
    meant = second.query(everything=True, include_pinned=True)
    assert second.admin.purges.purge(meant).deleted == 3
    assert machines.num_objects() == 0


def test_a_tag_that_comes_later_reaches_the_server(machines: Machines) -> None:
    """So that another machine's purge finds the block."""
    first, second = machines.start(), machines.start()
    first.serve(PROMPT, CacheOptions())
    first.cache.offload()
    first.serve([*PROMPT, 1], CacheOptions(tags=["late"]))
    first.cache.poll()
    first.settle()

    assert second.admin.purges.purge(second.query(tags=("late",))).deleted == 3
    assert machines.num_objects() == 0
