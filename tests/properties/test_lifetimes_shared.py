"""Lifetimes over a real server that outlives the cache, alone and below a disk, against the plain model."""

from collections.abc import Iterator, Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from kvkeep.blocks import stored_key
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.tiers.base import Presence, Tier
from kvkeep.tiers.resp import RespTier
from tests.lifetime_cache import LifetimeCache, disk
from tests.properties.test_lifetimes_machine import (
    SALTS,
    SESSIONS,
    LifetimeMachine,
    lives,
    prompts,
    salts,
    spans,
)
from tests.servers import RedisServer


def _has_blocks(machine: LifetimeMachine) -> bool:
    return hasattr(machine, "model") and bool(machine.model.marks)


class SharedMachine(LifetimeMachine):
    """Restarts of the cache, where the server has all that was there, and of the server, which begins empty.

    What a server has is known when it is read, or found by a purge: after a restart all that is alive is
    asked for once, so that the orders of the machine mean what the model means.
    """

    server: RedisServer
    has_disk = False

    def open(self) -> None:
        """A process over the server, and over the folder of this example."""
        self.remote = RespTier(
            self.server.url, key_prefix=f"{self.folder.name}:", timeout_s=20.0, name="remote"
        )
        # What outlives a crash, and what it says.
        self.disk = disk(self.folder) if self.has_disk else self.remote  # type: ignore[assignment]
        tiers: list[Tier] = [self.disk, self.remote] if self.has_disk else [self.remote]
        self.checked = LifetimeCache(
            self.clock,
            tiers=tiers,
            groups=self.groups,
            room=512,
            before=getattr(self, "checked", None),
        )
        self.admin = self.checked.admin
        self.admin.purges.wait_until_restored()

    def known(self, salt: str, prompt: Sequence[int]) -> list[bool]:
        """Whether a request would use each full block, be it one that it only learns of by asking."""
        chain = self.checked.chain([*prompt, 0], salt)
        lookup = self.checked.cache.look_up(chain)
        self.checked.settle()
        gaps = self.checked.cache._plan(chain, lookup=lookup).coverage.gaps
        size = self.checked.spec.block_size
        starts = range(0, len(prompt) // size * size, size)
        found = [all(one.stop <= at or one.start >= at + size for one in gaps) for at in starts]
        dead = [not self.model.is_alive(key) for key in self.model.blocks(salt, prompt)]
        if any(here and is_dead for here, is_dead in zip(found, dead, strict=True)):
            # It lies there, and nobody has judged its labels yet: who asks for it does not get it.
            claim = self.checked.cache.open_claim(CacheOptions(write=False), chain)
            lease = self.checked.begin([*prompt, 0], salt, write=False, claim=claim)
            for at in starts:
                is_served = all(gap.stop <= at or gap.start >= at + size for gap in lease.gaps)
                assert not (dead[at // size] and is_served)
            lease.release()
            self.checked.cache.close_claim(claim, chain)
            found = [here and not is_dead for here, is_dead in zip(found, dead, strict=True)]
        return found

    def learn(self) -> None:
        """Ask for all that was ever there; who asks leaves nothing, but uses what is alive."""
        for salt, prompt in sorted(self.seen):
            if len(prompt) < self.checked.spec.block_size:
                continue
            self.ask(salt, prompt, CacheOptions(salt=salt or None, write=False))

    # Of what was not used since the start a server says nothing: no purge finds it by that.
    @rule(
        by=st.sampled_from(["tags", "sessions", "salts", "older", "everything"]),
        at=st.integers(0, 11),
        salt=st.sampled_from([None, *SALTS]),
        include_pinned=st.booleans(),
    )
    def purge(self, by: str, at: int, salt: str | None, include_pinned: bool) -> None:
        super().purge(by=by, at=at, salt=salt, include_pinned=include_pinned)

    @rule(
        prompt=prompts,
        salt=salts,
        session=st.sampled_from([None, *SESSIONS]),
        tags=spans,
        ttl=lives,
        does_move=st.booleans(),
    )
    def serve_more(
        self,
        prompt: list[int],
        salt: str,
        session: str | None,
        tags: list[TagSpan],
        ttl: float | str | None,
        does_move: bool,
    ) -> None:
        """Most examples are to have blocks in the server, and none of them here."""
        self.serve(
            prompt=[0, 0, 0, 0, *prompt],
            salt=salt,
            session=session,
            tags=tags,
            ttl=ttl,
            counts_from="use",
            write=True,
        )
        if does_move:
            self.checked.cache.offload()

    @precondition(_has_blocks)
    @rule(seconds=st.sampled_from([0, 0, 5, 20]))
    def restart(self, seconds: float) -> None:
        """What ends while nobody runs lies in the server still, and is not served."""
        self.checked.cache.close()
        self.clock.now_s += seconds
        self.open()
        self.start_anew()
        self.what_lives_is_known_and_nothing_else()
        self.learn()

    @precondition(_has_blocks)
    @rule(tag=st.sampled_from(["t", "u"]), include_pinned=st.booleans())
    def restart_and_purge(self, tag: str, include_pinned: bool) -> None:
        """A process that knows nothing of what the server has finds all of it by its labels."""
        self.checked.cache.close()
        self.open()
        self.start_anew()
        meant = [
            key
            for key, mark in self.model.alive().items()
            if tag in mark.tags and (include_pinned or not mark.pins)
        ]

        receipt = self.admin.purges.purge(
            self.checked.query(tags=(tag,), include_pinned=include_pinned)
        )

        assert receipt.deleted == receipt.matched - receipt.skipped_pinned == len(meant)
        assert sum(receipt.stored.values()) >= len(meant)
        self.model.forget(meant)
        if not self.has_disk:
            # Of names that only what is gone bore nobody has heard here.
            self.start_anew()
        self.learn()

    @precondition(lambda self: not self.has_disk and _has_blocks(self))
    @rule()
    def crash(self) -> None:
        super().crash()
        self.learn()

    @precondition(_has_blocks)
    @rule()
    def lose_the_server(self) -> None:
        """It begins empty: what lies nowhere else is gone, and nothing that is gone is served."""
        self.quiet()
        self.checked.cache.close()
        self.server.kill()
        self.server.start()
        self.open()
        if not self.has_disk:
            self.model.marks.clear()
        self.start_anew()
        self.learn()

    def all_stored(self, tier: Tier) -> bool:
        """Whether a tier has all parts of all blocks that are alive."""
        groups = range(len(self.groups))
        keys = [stored_key(self.chain_key(key), at) for key in self.model.alive() for at in groups]
        return all(one is Presence.PRESENT for one in tier.find(keys))

    @precondition(_has_blocks)
    @rule()
    def all_is_where_it_should_be(self) -> None:
        """When all has moved down and nothing is under way, every tier has every block that is alive."""
        self.checked.cache.offload()
        self.quiet()
        if self.has_disk:
            assert self.all_stored(self.disk)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all examples, each of which has keys of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.mark.parametrize("has_disk", [False, True], ids=["a server", "a disk and a server"])
def test_lifetimes_over_a_server_are_those_of_the_model(
    server: RedisServer, has_disk: bool
) -> None:
    """Nothing expired or purged is served, nothing else is lost, receipts say what happened."""
    machine = type("Machine", (SharedMachine,), {"server": server, "has_disk": has_disk})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(15, settings().max_examples // 20),
            stateful_step_count=30,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
