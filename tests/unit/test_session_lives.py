"""When sessions end: those of the usual life in the order of their use, others at their own time."""

from math import inf
from random import Random

from kvkeep.cache.lifetimes import SessionId
from kvkeep.cache.lifetimes.sessions import Sessions
from kvkeep.spec import BlockKey

ROOT = BlockKey(b"r" * 32)
NAMES = [SessionId(ROOT, name) for name in "abcdefgh"]


def test_a_session_of_its_own_life_ends_at_its_time() -> None:
    """Sooner or later than the others, and never with an infinite one; a use puts it off."""
    sessions = Sessions(100.0)
    short, usual, lasting = NAMES[:3]
    for name in (short, usual, lasting):
        sessions.use(name, 0.0)
    for name, ttl_s in ((short, 10.0), (lasting, inf)):
        found = sessions.get(name)
        assert found is not None
        sessions.set_ttl(found, ttl_s, 0.0)

    assert sessions.next_end == 10.0
    sessions.use(short, 5.0)
    assert sessions.due(14.0) == []
    assert sessions.due(15.0) == [short]
    sessions.end(short)
    assert sessions.next_end == 100.0
    assert sessions.due(1e9) == [usual]
    sessions.end(usual)
    assert sessions.next_end == inf
    assert [one.session_id for one in sessions.all()] == [lasting]


def test_open_requests_keep_a_session_of_its_own_life() -> None:
    """As long as they run, and its life long behind them."""
    sessions = Sessions(inf)
    session = sessions.use(NAMES[0], 0.0)
    sessions.set_ttl(session, 10.0, 0.0)
    session.num_open = 1

    assert sessions.due(50.0) == []
    session.num_open = 0
    assert sessions.due(59.0) == []
    assert sessions.due(60.0) == [NAMES[0]]


def test_sessions_end_as_a_plain_list_of_times_says() -> None:
    """Random uses, lives and ends against a dict; `next_end` is never late."""
    random = Random(7)
    sessions, usual = Sessions(20.0), 20.0
    used: dict[SessionId, float] = {}
    lives: dict[SessionId, float] = {}
    for now_s in range(3000):
        name = random.choice(NAMES)
        match random.randrange(4):
            case 0:
                sessions.use(name, now_s)
                used[name] = now_s
            case 1 if name in used:
                session = sessions.get(name)
                assert session is not None
                lives[name] = random.choice((1.0, 7.0, 40.0, inf))
                sessions.set_ttl(session, lives[name], now_s)
                used[name] = now_s
            case 2 if name in used:
                sessions.end(name)
                del used[name]
                lives.pop(name, None)
        ended = {one for one, at in used.items() if at + lives.get(one, usual) <= now_s}
        assert not ended or sessions.next_end <= now_s
        due = sessions.due(now_s)
        assert len(due) == len(set(due))
        assert set(due) == ended
        for one in ended:
            sessions.end(one)
            del used[one]
            lives.pop(one, None)
        assert len(sessions) == len(used)
        order = [used[one.session_id] for one in sessions.all()]
        assert order == sorted(order)


def test_of_many_sessions_those_of_which_nothing_is_left_are_forgotten() -> None:
    """None that has blocks or a request; others are there as long as there are few."""
    sessions = Sessions(inf)
    names = [SessionId(ROOT, f"{number}") for number in range(10_000)]
    for name in names[:1000]:
        sessions.use(name, 0.0)
    sessions.prune(lambda _: False)
    assert len(sessions) == 1000
    for name in names:
        sessions.use(name, 0.0)
    sessions.use(names[7], 1.0).num_open = 1
    for _ in range(100):
        sessions.prune(lambda one: one in names[:5])

    assert {one.session_id for one in sessions.all()} == {*names[:5], names[7]}
    assert not sessions.has_ended(names[6])
