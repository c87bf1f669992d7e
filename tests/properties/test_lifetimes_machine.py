"""Lifetimes over a real disk against a plain model: nothing that ended is served, nothing else is lost."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvkeep.blocks import stored_key
from kvkeep.cache import PinId, PurgeReceipt
from kvkeep.cache.lifetimes import decode_labels
from kvkeep.cache.lifetimes.versions import outdated_tags
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.errors import RequestError
from kvkeep.spec import BlockKey, GroupSpec
from kvkeep.tiers.base import Tier
from kvkeep.tiers.host import HostTier
from tests.content_store import full, sliding
from tests.lifetime_books import SIZE, Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk
from tests.lifetime_model import Key, LifetimeModel

SALTS = ("", "x")
SESSIONS = ("a", "b", "c")
TAGS = ("t", "u", "f@1", "f@2")
PINS = ("p", "q")

prompts = st.builds(
    lambda cut, suffix: ([0] * 12)[:cut] + suffix or [0],
    st.integers(0, 12),
    st.lists(st.integers(0, 1), max_size=5),
)
salts = st.sampled_from(SALTS)
lives = st.sampled_from([None, None, 0, 5, 20, "never"])
spans = st.lists(
    st.builds(TagSpan, tag=st.sampled_from(TAGS), start=st.integers(0, 14)), max_size=2
)


class LifetimeMachine(RuleBasedStateMachine):
    """Requests, orders, time and restarts, over a device and tiers that have room for everything."""

    groups: tuple[GroupSpec, ...] = (full(),)
    has_memory = False
    # Then a request does not read, nor compute, all that lies before its end.
    has_windows = False

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvkeep-lifetimes-"))
        self.clock = Clock()
        self.model = LifetimeModel(self.clock)
        self.seen: set[Key] = set()
        self.open()

    def open(self) -> None:
        """A process over the folder."""
        self.disk = disk(self.folder)
        tiers: list[Tier] = [HostTier(MANY)] if self.has_memory else []
        self.checked = LifetimeCache(
            self.clock,
            tiers=[*tiers, self.disk],
            groups=self.groups,
            room=512,
            before=getattr(self, "checked", None),
        )
        self.admin = self.checked.admin
        # Before that a block is judged when it comes; what is promised may be too much.
        self.admin.purges.wait_until_restored()

    # --- requests ----------------------------------------------------------------------------------

    @rule(
        prompt=prompts,
        salt=salts,
        session=st.sampled_from([None, *SESSIONS]),
        tags=spans,
        ttl=lives,
        counts_from=st.sampled_from(["use", "first"]),
        write=st.sampled_from([True, True, True, False]),
    )
    def serve(
        self,
        prompt: list[int],
        salt: str,
        session: str | None,
        tags: list[TagSpan],
        ttl: float | str | None,
        counts_from: str,
        write: bool,
    ) -> None:
        options = CacheOptions(
            session=session,
            tags=tags,
            ttl=ttl,
            ttl_counts_from=counts_from,
            salt=salt or None,
            write=write,
        )
        known = {
            tag for (of, _), mark in self.model.alive().items() if of == salt for tag in mark.tags
        }
        old = outdated_tags([one.tag for one in tags], known)
        self.model.forget(
            [
                key
                for key, mark in self.model.alive().items()
                if key[0] == salt and mark.tags & old and not mark.pins
            ]
        )
        self.ask(salt, prompt, options)
        self.seen.add((salt, tuple(prompt)))
        if session is not None:
            self.model.sessions.add((salt, session))

    def ask(self, salt: str, prompt: Sequence[int], options: CacheOptions) -> None:
        """A request computes no token of a block that is alive, the last aside, and some of all others."""
        blocks = self.model.blocks(salt, prompt)
        num_known = sum(map(self.model.is_alive, blocks))
        # The last token is computed for its logits, be it of a block that is known.
        has_last = len(prompt) % SIZE == 0 and self.model.is_alive(blocks[-1])
        computed = self.checked.serve(prompt, options)
        # Of a block that is not known the first tokens may be those of one that is.
        most = len(prompt) - num_known * SIZE + has_last
        assert self.has_windows or len(blocks) - num_known <= computed <= most
        self.model.use(salt, prompt, options)

    @rule(seconds=st.sampled_from([1, 4, 5, 6, 20, 1000]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(seconds=st.sampled_from([5, 20]))
    def expire(self, seconds: float) -> None:
        """The receipt counts what ended in these seconds, which are over now."""
        self.quiet()
        before = self.model.alive()
        self.clock.now_s += seconds
        ended = [key for key in before if not self.model.is_alive(key)]

        receipt = self.admin.purges.expire()

        assert (receipt.matched, receipt.deleted) == (len(ended), len(ended))
        self.model.forget(ended)

    # --- orders ------------------------------------------------------------------------------------

    @rule(
        by=st.sampled_from(["tags", "sessions", "salts", "older", "unused", "everything"]),
        at=st.integers(0, 11),
        salt=st.sampled_from([None, *SALTS]),
        include_pinned=st.booleans(),
    )
    def purge(self, by: str, at: int, salt: str | None, include_pinned: bool) -> None:
        """Exactly what the selector means goes; a dry run says the same before."""
        self.quiet()
        now_s, fields = self.clock.now_s, dict[str, object]()
        meant = self.model.alive()
        if salt is not None and by != "everything":
            fields["salts"] = (salt or None,)
            meant = {key: mark for key, mark in meant.items() if key[0] == salt}
        if by == "tags":
            fields["tags"] = (tag,) = (TAGS[at % len(TAGS)],)
            meant = {key: mark for key, mark in meant.items() if tag in mark.tags}
        elif by == "sessions":
            fields["sessions"] = names = (SESSIONS[at % 3], SESSIONS[at // 4])
            meant = {key: mark for key, mark in meant.items() if mark.is_own(names)}
        elif by == "older":
            fields["older_than_s"] = at
            meant = {key: mark for key, mark in meant.items() if mark.created <= now_s - at}
        elif by == "unused":
            fields["unused_for_s"] = at
            meant = {
                key: mark
                for key, mark in meant.items()
                if mark.used is None or mark.used <= now_s - at
            }
        elif by == "salts":
            fields["salts"] = (salt or None,)
            meant = {key: mark for key, mark in meant.items() if key[0] == (salt or "")}
        else:
            fields["everything"] = True
        free = [key for key, mark in meant.items() if include_pinned or not mark.pins]
        query = self.checked.query(include_pinned=include_pinned, **fields)

        planned = self.admin.purges.purge(query, dry_run=True)
        receipt = self.admin.purges.purge(query)

        assert numbers(planned) == numbers(receipt)
        assert (receipt.matched, receipt.deleted) == (len(meant), len(free))
        assert receipt.skipped_pinned == len(meant) - len(free)
        self.model.forget(free)

    @rule(salt=salts, session=st.sampled_from(SESSIONS))
    def close_session(self, salt: str, session: str) -> None:
        """What only it used goes."""
        self.quiet()
        own = {
            key: mark
            for key, mark in self.model.alive().items()
            if key[0] == salt and mark.is_own([session])
        }
        free = [key for key, mark in own.items() if not mark.pins]

        receipt = self.admin.close_session(self.checked.session_id(session, salt))

        assert (receipt.matched, receipt.deleted) == (len(own), len(free))
        self.model.forget(free)
        for key, mark in self.model.marks.items():
            if key[0] == salt:
                mark.sessions.discard(session)
        self.model.sessions.discard((salt, session))

    @rule(salt=salts, parent=st.sampled_from(SESSIONS), child=st.sampled_from(SESSIONS))
    def fork_session(self, salt: str, parent: str, child: str) -> None:
        """The child uses what the parent does; there is no child of nobody."""
        ids = [self.checked.session_id(name, salt) for name in (parent, child)]
        if (salt, parent) not in self.model.sessions:
            with pytest.raises(RequestError):
                self.admin.fork_session(ids[0], ids[1])
            return
        self.admin.fork_session(ids[0], ids[1])
        self.model.sessions.add((salt, child))
        for key, mark in self.model.alive().items():
            if key[0] == salt and parent in mark.sessions:
                mark.sessions.add(child)

    @rule(salt=salts, prompt=prompts, name=st.sampled_from(PINS))
    def pin(self, salt: str, prompt: list[int], name: str) -> None:
        """What is known of a prompt stays until all its pins have ended."""
        if self.model.pins.get(name, salt) != salt:
            return
        known = [key for key in self.model.blocks(salt, prompt) if self.model.is_alive(key)]
        chain = self.checked.chain(prompt, salt)
        if not known:
            with pytest.raises(RequestError):
                self.admin.pin(PinId(name), chain)
            return
        self.admin.pin(PinId(name), chain)
        self.model.pins[name] = salt
        for key in known:
            self.model.marks[key].pins.add(name)

    @rule(name=st.sampled_from(PINS))
    def unpin(self, name: str) -> None:
        """What nobody uses any more goes with the last pin."""
        if name not in self.model.pins:
            with pytest.raises(RequestError):
                self.admin.unpin(PinId(name))
            return
        self.admin.unpin(PinId(name))
        del self.model.pins[name]
        for key, mark in list(self.model.marks.items()):
            if name in mark.pins:
                mark.pins.discard(name)
                if not mark.pins and not mark.sessions and not mark.is_shared:
                    del self.model.marks[key]

    # --- places ------------------------------------------------------------------------------------

    @rule()
    def offload(self) -> None:
        self.checked.cache.offload()

    @rule()
    def quiet(self) -> None:
        """Let everything that is under way come to its end."""
        for _ in range(3):
            self.checked.cache.poll()
            self.checked.settle()

    @rule()
    def restart(self) -> None:
        """In good order nothing is lost but when blocks were used."""
        self.checked.cache.close()
        self.open()
        self.start_anew()

    @rule()
    def crash(self) -> None:
        """What lay on the disk is there, with its tags and pins; it may end earlier than was asked for."""
        self.quiet()
        stored = {one.key for one in self.disk.objects()}
        groups = range(len(self.groups))
        names = {self.chain_key(key): key for key in self.model.marks}
        assert {BlockKey(key[:-1]) for key in stored} <= set(names), (
            "what was purged lies on the disk"
        )
        for name, key in names.items():
            if not all(stored_key(name, group) in stored for group in groups):
                del self.model.marks[key]
                continue
            labels = decode_labels(self.disk.labels(stored_key(name, 0)) or b"")
            mark = self.model.marks[key]
            assert labels is not None
            assert labels.tags == mark.tags
            assert set(labels.pins) == mark.pins
            assert labels.created_at == mark.created
            assert labels.expires_at <= mark.expires
            assert labels.sessions <= mark.sessions
            mark.expires, mark.sessions = labels.expires_at, set(labels.sessions)
            mark.is_shared = labels.is_shared
        # Closed first, the disk takes nothing that the dying process might still want to write.
        self.disk.close()
        self.checked.cache.close()
        self.open()
        self.start_anew()

    def chain_key(self, key: Key) -> BlockKey:
        """The key of a block."""
        return self.checked.chain(key[1], key[0]).keys[-1]

    def start_anew(self) -> None:
        """What the model forgets with a process."""
        self.model.marks = self.model.alive()
        for mark in self.model.marks.values():
            mark.used = None
        self.model.sessions = {
            (key[0], name) for key, mark in self.model.marks.items() for name in mark.sessions
        }
        self.model.pins = {
            name: key[0] for key, mark in self.model.marks.items() for name in mark.pins
        }

    # --- what must hold ----------------------------------------------------------------------------

    @invariant()
    def what_lives_is_known_and_nothing_else(self) -> None:
        if hasattr(self, "checked"):
            for salt, prompt in self.seen:
                expected = [self.model.is_alive(key) for key in self.model.blocks(salt, prompt)]
                assert self.known(salt, prompt) == expected

    def known(self, salt: str, prompt: Sequence[int]) -> list[bool]:
        """What the cache says of each full block."""
        return self.checked.known(prompt, salt)

    @precondition(lambda self: hasattr(self, "checked"))
    @rule()
    def names_are_those_of_the_model(self) -> None:
        roots = {self.checked.root(salt): salt for salt in SALTS}
        found = {(roots[one.namespace], one.name) for one in self.admin.sessions()}
        assert found == self.model.sessions
        for report in self.admin.pins():
            own = [key for key, mark in self.model.marks.items() if report.name in mark.pins]
            assert report.num_blocks == len(own)
            assert self.model.pins[report.name] == roots[report.namespace]
        assert {report.name for report in self.admin.pins()} == set(self.model.pins)
        verified = self.checked.cache.verify(tiers=True)
        assert verified.ok, verified.problems

    def teardown(self) -> None:
        if hasattr(self, "checked"):
            self.checked.cache.close()
            shutil.rmtree(self.folder)


def numbers(receipt: PurgeReceipt) -> tuple[object, ...]:
    """All that a receipt counts."""
    return (
        receipt.matched,
        receipt.deleted,
        receipt.freed_bytes,
        receipt.skipped_pinned,
        receipt.in_use,
        receipt.stored,
    )


@pytest.mark.parametrize(
    ("groups", "has_memory"),
    [((full(),), False), ((full("a"), full("b")), True), ((full(), sliding(64)), True)],
    ids=["disk", "memory and disk", "a window"],
)
def test_lifetimes_are_those_of_the_model(groups: tuple[GroupSpec, ...], has_memory: bool) -> None:
    """Whatever comes in whatever order, requests find exactly what is alive."""
    fields = {
        "groups": groups,
        "has_memory": has_memory,
        "has_windows": any(group.window is not None for group in groups),
    }
    machine = type("Machine", (LifetimeMachine,), fields)
    num_examples = max(25, settings().max_examples // 10)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=num_examples, stateful_step_count=30)
    )
