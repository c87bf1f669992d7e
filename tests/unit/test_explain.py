"""The history of prompts says why a request missed, and tells it to nobody else."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache.explain import History, Miss, MissType, Outline, Sent
from kvkeep.cache.explain.compare import common_tokens, recurring_tokens
from kvkeep.spec import Span

SIZE = 4
NAMESPACE = Namespace(model="m", positions="p", kv_format="bf16", block_size=SIZE)


def tokens(text: str) -> list[int]:
    """A token for every character."""
    return [ord(letter) for letter in text]


def sent(text: str | Sequence[int], *, namespace: Namespace = NAMESPACE, **options: Any) -> Sent:
    """A prompt, a token for every character."""
    ids = tokens(text) if isinstance(text, str) else text
    chain = TokenChain(namespace.root_key(), namespace.block_size, ids)
    return Sent(namespace=namespace, chain=chain, **options)


def everything(one: Sent) -> list[Span]:
    """The gap of a request of which nothing is known."""
    return [Span(0, len(one.chain))]


def from_token(one: Sent, start: int) -> list[Span]:
    """The gap of a request that is known up to a token."""
    return [Span(start, len(one.chain))]


SYSTEM = "You are a careful and friendly assistant of the library. "
RULES = "Answer in one sentence, and name the source of what you say. "


def test_text_that_nobody_sent_is_a_first_request() -> None:
    """Without anything like it nothing was missed, and that is what is said."""
    history = History()
    one = sent(SYSTEM)

    assert history.explain(one, everything(one)) == Miss(
        type=MissType.FIRST_REQUEST, missed_tokens=0
    )


def test_a_conversation_that_goes_on_misses_nothing() -> None:
    """New text behind what was sent before is computed because it is new."""
    history = History()
    history.remember(sent(SYSTEM, session="s"))
    longer = sent(SYSTEM + RULES, session="s")

    assert history.explain(longer, from_token(longer, len(SYSTEM) // SIZE * SIZE)) is None


def test_another_question_behind_the_same_text_misses_nothing() -> None:
    """Requests that share a beginning and nothing else are not changes of each other."""
    history = History()
    history.remember(sent(SYSTEM + "Where is the map room, please?"))
    other = sent(SYSTEM + "I would like to borrow seven books.")

    assert history.explain(other, from_token(other, len(SYSTEM) // SIZE * SIZE)) is None


def test_a_time_in_the_system_text_is_found_with_its_place_and_a_snippet() -> None:
    """The first token that differs, the message it is in, and some text of both prompts around it."""
    history = History()
    old, new = f"It is 14:19. {SYSTEM}{RULES}", f"It is 14:20. {SYSTEM}{RULES}"
    outline = Outline(message_starts=(0, 13 + len(SYSTEM)), roles=("system", "user"))
    history.remember(sent(old, outline=outline))
    one = sent(new, outline=outline)

    miss = history.explain(one, from_token(one, 8))

    assert miss is not None
    assert miss.type is MissType.SYSTEM_CHANGED
    assert miss.first_divergent_token == 9
    assert miss.message_index == 0
    assert miss.missed_tokens == len(old) - 11
    assert miss.snippet_start == 1
    assert "".join(map(chr, miss.cached_ids)) == old[1:33]
    assert "".join(map(chr, miss.sent_ids)) == new[1:33]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, MissType.SYSTEM_CHANGED),
        ({"tools": b"other"}, MissType.TOOLS_CHANGED),
        ({"template": b"other"}, MissType.TEMPLATE_CHANGED),
        ({"message_starts": (0, 2), "roles": ("system", "user")}, MissType.MESSAGES_CHANGED),
        ({"message_starts": (30,), "roles": ("user",)}, MissType.SYSTEM_CHANGED),
        ({"message_starts": (30,), "roles": ("user",), "tools": b"o"}, MissType.TOOLS_CHANGED),
        ({"message_starts": (), "roles": ()}, MissType.MESSAGES_CHANGED),
        ({"tools": None, "template": None}, MissType.SYSTEM_CHANGED),
    ],
)
def test_what_changed_is_told_by_where_the_prompts_part(
    change: dict[str, Any], expected: MissType
) -> None:
    """Messages by their starts and roles; tools and templates by their digests."""
    history = History()
    whole: dict[str, Any] = {
        "message_starts": (0,), "roles": ("system",), "tools": b"", "template": b"",
    }  # fmt: skip
    history.remember(sent("abcdefgh" + SYSTEM + RULES, outline=Outline(**whole)))
    one = sent("abcdefgX" + SYSTEM + RULES, outline=Outline(**whole | change))

    miss = history.explain(one, from_token(one, SIZE))

    assert miss is not None
    assert miss.type is expected


def test_a_dropped_beginning_of_a_conversation_is_a_change_of_its_messages() -> None:
    """Text that comes again behind a cut was cached, and is of no use there."""
    history = History()
    system, first, second = SYSTEM, "first question, answered long ago. ", RULES
    history.remember(sent(system + first + second, session="s"))
    starts = (0, len(system), len(system) + len(second))
    outline = Outline(message_starts=starts, roles=("system", "user", "user"))
    one = sent(system + second + "and now?", session="s", outline=outline)

    miss = history.explain(one, from_token(one, len(system) // SIZE * SIZE))

    assert miss is not None
    assert miss.type is MissType.MESSAGES_CHANGED
    assert miss.message_index == 1
    assert miss.missed_tokens == len(second)


def test_a_session_is_compared_with_its_own_last_prompt() -> None:
    """A prompt of another session that begins more alike is not what changed."""
    history = History()
    history.remember(sent("AAAA" + SYSTEM + RULES, session="mine"))
    history.remember(sent("AABA" + "no such text anywhere, never mind.", session="yours"))
    one = sent("AABC" + SYSTEM + RULES, session="mine")

    miss = history.explain(one, everything(one))

    assert miss is not None
    assert miss.first_divergent_token == 2


def test_a_session_whose_prompt_another_continued_is_compared_with_what_it_sent() -> None:
    """Of a shared beginning each session remembers how far it went."""
    history = History()
    history.remember(sent(SYSTEM, session="a"))
    history.remember(sent(SYSTEM + RULES, session="b"))
    one = sent(SYSTEM + "Something else, then. " + RULES, session="a")

    assert history.explain(one, from_token(one, len(SYSTEM) // SIZE * SIZE)) is None


@pytest.mark.parametrize(
    "reason",
    [MissType.EVICTED, MissType.EXPIRED, MissType.INVALIDATED, MissType.CORRUPT_REJECTED],
)
def test_blocks_that_are_gone_are_explained_by_how_they_went(reason: MissType) -> None:
    """What is said of a key holds for the request that has it; counted are the tokens of such blocks."""
    history = History()
    one = sent(SYSTEM, outline=Outline(message_starts=(0, 8), roles=("system", "user")))
    history.remember(one)
    history.note_gone(one.chain.keys[2:5], reason)

    miss = history.explain(one, [Span(8, 20)])

    assert miss == Miss(type=reason, missed_tokens=12, message_index=1)


def test_the_last_that_was_said_of_a_key_holds() -> None:
    """A block that was evicted, came back, and expired has expired."""
    history = History()
    one = sent(SYSTEM)
    history.note_gone(one.chain.keys, MissType.EVICTED)
    history.note_gone(one.chain.keys, MissType.EXPIRED)

    miss = history.explain(one, everything(one))

    assert miss is not None
    assert miss.type is MissType.EXPIRED


def test_only_so_many_keys_are_remembered() -> None:
    """The longest ago are forgotten, and then nothing is guessed of them."""
    history = History(max_gone=2)
    one = sent(SYSTEM)
    history.remember(one)
    history.note_gone(one.chain.keys[:3], MissType.EVICTED)

    forgotten = history.explain(one, [Span(0, SIZE)])
    known = history.explain(one, [Span(SIZE, 3 * SIZE)])

    assert forgotten == Miss(type=MissType.UNKNOWN, missed_tokens=SIZE)
    assert known == Miss(type=MissType.EVICTED, missed_tokens=2 * SIZE)


def test_computing_by_choice_is_no_loss() -> None:
    """Blocks that a tier has and that were quicker computed are called so."""
    history = History()
    one = sent(SYSTEM)
    history.remember(one)

    miss = history.explain(one, [Span(0, 8)], by_choice={0, 1})

    assert miss == Miss(type=MissType.QUICKER_COMPUTED, missed_tokens=8)


def test_a_request_that_does_not_read_is_told_so() -> None:
    """And how much it could have had."""
    history = History()
    history.remember(sent(SYSTEM))
    one = sent(SYSTEM, reads=False)

    miss = history.explain(one, everything(one))

    assert miss == Miss(type=MissType.DISABLED, missed_tokens=len(SYSTEM) // SIZE * SIZE)


def test_less_than_a_block_is_too_short() -> None:
    """No part of it could have been kept."""
    history = History()
    one = sent("abc")

    assert history.explain(one, everything(one)) == Miss(type=MissType.TOO_SHORT, missed_tokens=0)


def test_a_prompt_that_is_wholly_known_misses_nothing() -> None:
    """Its last token is computed for its logits: that is no miss."""
    history = History()
    one = sent(SYSTEM[:40])
    history.remember(one)

    assert history.explain(one, [Span(39, 40)]) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"salt": "other"}, MissType.SALT_CHANGED),
        ({"model": "other"}, MissType.MODEL_CHANGED),
        ({"positions": "other"}, MissType.MODEL_CHANGED),
        ({"kv_format": "int4"}, MissType.CODEC_CHANGED),
        ({"salt": "other", "kv_format": "int4"}, MissType.CODEC_CHANGED),
    ],
)
def test_an_owner_is_told_what_differs_between_its_namespaces(
    change: dict[str, Any], expected: MissType
) -> None:
    """The same text under another salt, model or format was kept, and is not for this request."""
    history = History()
    fields = {name: getattr(NAMESPACE, name) for name in NAMESPACE.__slots__}
    history.remember(sent(SYSTEM, namespace=Namespace(**fields | change), owner="o"))
    one = sent(SYSTEM, owner="o")

    miss = history.explain(one, everything(one))

    assert miss == Miss(type=expected, missed_tokens=len(SYSTEM) // SIZE * SIZE)


@pytest.mark.parametrize(("theirs", "mine"), [("a", "b"), (None, None), ("a", None), (None, "a")])
def test_nothing_is_told_of_the_prompts_of_other_tenants(
    theirs: str | None, mine: str | None
) -> None:
    """Another namespace is silent unless one owner has both; no answer depends on what is in it."""
    history = History()
    other = Namespace(model="m", positions="p", kv_format="bf16", block_size=SIZE, salt="x")
    history.remember(sent(SYSTEM + RULES, namespace=other, owner=theirs, session="s"))
    history.note_gone(sent(SYSTEM, namespace=other).chain.keys, MissType.EXPIRED)
    prompts = [SYSTEM + RULES, "X" + SYSTEM + RULES, SYSTEM + "!" + RULES]

    for prompt in prompts:
        one = sent(prompt, owner=mine, session="s")
        told = history.explain(one, everything(one))
        assert told == History().explain(one, everything(one))


def test_what_a_namespace_sent_can_be_forgotten() -> None:
    """Erasing a tenant leaves nothing of its text."""
    history = History()
    history.remember(sent("It is 14:19. " + SYSTEM + RULES, session="s"))
    history.remember(sent(RULES))
    one = sent("It is 14:20. " + SYSTEM + RULES)
    assert history.explain(one, everything(one)) != Miss(
        type=MissType.FIRST_REQUEST, missed_tokens=0
    )

    history.forget(NAMESPACE.root_key())

    assert history.explain(one, everything(one)) == Miss(
        type=MissType.FIRST_REQUEST, missed_tokens=0
    )
    assert len(history._prompts) == 0
    assert history._prompts.num_bytes == 0


def test_closing_a_session_forgets_what_only_it_sent() -> None:
    """Prompts of others, and those without a session, stay."""
    history = History()
    root = NAMESPACE.root_key()
    history.remember(sent("own " + SYSTEM, session="s"))
    history.remember(sent("shared " + SYSTEM, session="s"))
    history.remember(sent("shared " + SYSTEM, session="t"))
    history.remember(sent("free " + SYSTEM, session="s"))
    history.remember(sent("free " + SYSTEM))

    history.forget(root, "s")

    own, shared, free = (sent(f"{name} {SYSTEM}") for name in ("own", "shared", "free"))
    assert len(history._prompts) == 2
    assert history.explain(shared, everything(shared)) is not None
    for one, expected in ((shared, MissType.UNKNOWN), (free, MissType.UNKNOWN)):
        miss = history.explain(one, everything(one))
        assert miss is not None
        assert miss.type is expected
    miss = history.explain(own, everything(own))
    assert miss is not None
    assert miss.type is not MissType.UNKNOWN


def test_memory_is_bounded_by_bytes_and_by_number() -> None:
    """The prompts that were used longest ago go first."""
    history = History(max_prompts=3, max_bytes=4 * 100)
    for number in range(10):
        history.remember(sent([number] * 30, session=f"s{number}"))
    assert len(history._prompts) == 3
    assert history._prompts.num_bytes == 3 * 30 * 4
    history.remember(sent([77] * 90))

    assert len(history._prompts) == 1
    assert history._prompts.num_bytes == 90 * 4
    history.remember(sent([78] * 101))
    assert len(history._prompts) == 1


def test_a_conversation_is_one_prompt_however_many_turns_it_has() -> None:
    """Each turn continues the one before and takes its place."""
    history = History()
    for length in range(1, 30):
        history.remember(sent([7] * (length * 10), session="s"))
    history.remember(sent([7] * 20, session="t"))

    assert len(history._prompts) == 1
    assert history._prompts.num_bytes == 290 * 4


def packed(ids: Sequence[int]) -> bytes:
    """Tokens as a chain packs them."""
    return TokenChain(NAMESPACE.root_key(), SIZE, ids).packed(0, len(ids))


ids = st.lists(st.integers(0, 2), max_size=60)


@given(ids, ids, st.integers(0, 20), st.integers(0, 20))
def test_common_tokens_are_those_that_a_loop_counts(
    one: list[int], other: list[int], one_at: int, other_at: int
) -> None:
    """Halving finds what comparing token by token finds."""
    one_at, other_at = min(one_at, len(one)), min(other_at, len(other))
    expected = 0
    for mine, yours in zip(one[one_at:], other[other_at:], strict=False):
        if mine != yours:
            break
        expected += 1

    found = common_tokens(packed(one), packed(other), one_at=one_at, other_at=other_at)

    assert found == expected


def test_recurring_text_is_found_wherever_it_moved() -> None:
    """Two passages that changed places come again whole, new text between them does not count."""
    first, second = list(range(1000, 1100)), list(range(2000, 2080))
    head = list(range(10))
    earlier = head + first + second
    now = head + second + list(range(500, 540)) + first

    found = recurring_tokens(packed(now), packed(earlier), len(head))

    assert found == 180
    assert recurring_tokens(packed(now), packed(list(range(5000, 5400))), 0) == 0


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 60))
def test_no_two_prompts_are_too_strange_to_compare(one: bytes, other: bytes, start: int) -> None:
    """What comes again is never more than there is."""
    found = recurring_tokens(packed(list(one)), packed(list(other)), start)

    assert 0 <= found <= max(0, len(one) - start)
