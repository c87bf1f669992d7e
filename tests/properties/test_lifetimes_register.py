"""The register of labels against a plain dict."""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvkeep.cache.lifetimes import Labels, PinId, Register, SessionId, Tombstone
from kvkeep.spec import BlockKey

ROOTS = (BlockKey(b"r" * 32), BlockKey(b"s" * 32))
KEYS = [BlockKey(bytes([number]) * 32) for number in range(12)]

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, unique=True)
some_labels = st.builds(
    Labels,
    namespace=st.sampled_from(ROOTS),
    sessions=st.frozensets(st.sampled_from("ab")),
    is_shared=st.booleans(),
    tags=st.frozensets(st.sampled_from(["t", "f@1", "f@2"])),
    expires_at=st.sampled_from([5.0, 10.0, float("inf")]),
    created_at=st.sampled_from([0.0, 1.0]),
    priority=st.sampled_from([50, 70]),
    pins=st.frozensets(st.sampled_from([PinId("p")])),
)


class RegisterMachine(RuleBasedStateMachine):
    """Labels come, change and go; of what a tombstone means nothing is known from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.register = Register()
        self.model: dict[BlockKey, Labels] = {}
        self.used: dict[BlockKey, float] = {}
        self.buried: dict[Tombstone, set[BlockKey]] = {}

    @rule(keys=some_keys, labels=some_labels)
    def put(self, keys: list[BlockKey], labels: Labels) -> None:
        changes = self.register.update(keys, lambda _: labels)
        changed = {key for change in changes for key in change.keys}
        assert changed == {key for key in keys if self.model.get(key) != labels}
        assert all(self.model.get(key) == one.old for one in changes for key in one.keys)
        self.model.update(dict.fromkeys(keys, labels))
        self.is_not_buried(keys)

    def is_not_buried(self, keys: list[BlockKey]) -> None:
        """These are not to be found under any tombstone any more."""
        for under in self.buried.values():
            under.difference_update(keys)

    @rule(keys=some_keys, tag=st.sampled_from(["t", "f@3"]))
    def add_a_tag(self, keys: list[BlockKey], tag: str) -> None:
        """What has no labels stays without."""

        def tagged(old: Labels | None) -> Labels | None:
            return None if old is None else replace(old, tags=old.tags | {tag})

        self.register.update(keys, tagged)
        for key in keys:
            if key in self.model:
                self.model[key] = replace(self.model[key], tags=self.model[key].tags | {tag})

    @rule(keys=some_keys)
    def forget(self, keys: list[BlockKey]) -> None:
        self.register.forget(keys)
        self.is_not_buried(keys)
        for key in keys:
            self.model.pop(key, None)
            self.used.pop(key, None)

    @rule(tag=st.sampled_from(["t", "f@1"]), meant=st.none() | some_keys)
    def bury(self, tag: str, meant: list[BlockKey] | None) -> None:
        """A purge by tag begins, perhaps of some keys only."""
        fits_key = None if meant is None else set(meant).__contains__
        tombstone = Tombstone(lambda labels: tag in labels.tags, fits_key)
        self.register.bury(tombstone)
        under = {
            k for k, one in self.model.items() if tag in one.tags and (not meant or k in meant)
        }
        self.buried[tombstone] = under
        for key in under:
            del self.model[key]
            self.used.pop(key, None)

    @precondition(lambda self: self.buried)
    @rule(data=st.data())
    def lift(self, data: st.DataObject) -> None:
        """A purge has come to its end, and taken out what was not put anew."""
        tombstone = data.draw(st.sampled_from(list(self.buried)))
        found = {key for key in self.register if self.register.is_under(tombstone, key)}
        assert self.buried[tombstone] <= found <= set().union(*self.buried.values())
        self.register.forget(found)
        self.is_not_buried(list(found))
        self.register.lift(tombstone)
        del self.buried[tombstone]

    @rule(keys=some_keys, now_s=st.floats(0, 20))
    def touch(self, keys: list[BlockKey], now_s: float) -> None:
        known = [key for key in keys if key in self.model]
        self.register.touch(known, now_s)
        self.used.update(dict.fromkeys(known, now_s))

    @invariant()
    def all_ways_lead_to_the_same_blocks(self) -> None:
        register, model = self.register, self.model
        buried = set().union(*self.buried.values())
        expected: dict[BlockKey, Labels | None] = {**dict.fromkeys(buried), **model}
        assert {key: register.get(key) for key in register} == expected
        assert {key for key in KEYS if register.is_buried(key)} == buried
        assert all(register.encoded(key) == b"" for key in buried)
        assert {key: register.used_at(key) for key in self.used} == self.used
        for tag in ("t", "f@1", "f@2", "f@3"):
            assert _keys(register.tagged(tag)) == {k for k, one in model.items() if tag in one.tags}
        for root in ROOTS:
            own = {key for key, one in model.items() if one.namespace == root}
            assert _keys(register.of_namespace(root)) == own
            versions = {key for key in own if model[key].tags & {"f@1", "f@2", "f@3"}}
            assert _keys(register.of_versions((root,), "f@9")) == versions
            for session in "ab":
                users = {key for key in own if session in model[key].sessions}
                assert _keys(register.of_session(SessionId(root, session))) == users
        assert _keys(register.pinned(PinId("p"))) == {k for k, one in model.items() if one.pins}
        assert _keys(register.all()) == set(model)
        versions = {key for key, one in model.items() if one.tags & {"f@1", "f@2", "f@3"}}
        assert _keys(register.of_versions(None, "f@9")) == versions
        for now_s in (0.0, 5.0, 7.0, 10.0):
            dead = {key for key, one in model.items() if one.ends_at <= now_s}
            assert register.dead(KEYS, now_s) == dead | buried
            assert _keys(register.due(now_s)) == dead
            assert register.next_expiry <= min(
                [one.ends_at for one in model.values()], default=float("inf")
            )
        marked = {one for one in model.values() if one.pins or one.priority != 50}
        assert register.num_marked >= len(marked)
        assert register.check() == []


def _keys(groups: object) -> set[BlockKey]:
    return {key for _, keys in groups for key in keys}  # type: ignore[attr-defined]


def test_the_register_is_a_dict_with_more_ways_in() -> None:
    """Whatever is put, changed and forgotten, every index finds exactly the blocks that a scan would."""
    run_state_machine_as_test(RegisterMachine, settings=settings(stateful_step_count=40))


def test_blocks_beside_those_of_a_purge_are_found_when_younger_ones_have_their_labels() -> None:
    """A purge of one key splits what has equal labels in two: both parts are found."""
    meant, spared, younger = KEYS[:3]
    labels = Labels(namespace=ROOTS[0], created_at=1.0)
    register = Register()
    register.update([meant, spared], lambda _: labels)
    register.bury(Tombstone(lambda _: True, {meant}.__contains__))

    register.update([younger], lambda _: labels)

    assert _keys(register.all()) == {spared, younger}
