"""The book of contexts: bounded, and shared between tenants."""

from array import array
from contextlib import suppress

import pytest

from kvkeep.server.cache_contexts import Context, ContextBook
from kvkeep.server.errors import ApiError


def context(name: str, owner: str | None, *, tokens: int = 1, salt: str | None = None) -> Context:
    """A context of that name and owner."""
    return Context(
        name=name,
        salt=salt or owner,
        token_ids=array("I", range(tokens)),
        tags=(),
        ttl=None,
        pin=None,
        created_at=1.0,
        warmed_at=1.0,
        owner=owner,
    )


def fill(book: ContextBook, owner: str | None, *, tokens: int = 1) -> str:
    """Put contexts until the owner may have no more; what it is told then."""
    for number in range(1000):
        one = context(f"c{number}", owner, tokens=tokens, salt=f"{owner}-{number % 7}")
        with suppress(ApiError):
            book.check_room(one)
            book.put(one)
            continue
        with pytest.raises(ApiError) as refused:
            book.check_room(one)
        assert (refused.value.status, refused.value.code) == (413, "too_many")
        return refused.value.message
    raise AssertionError("there is no bound")


def test_who_is_alone_has_the_whole_book() -> None:
    """And is told how many there are, and what to do."""
    book = ContextBook(max_contexts=100)

    message = fill(book, "anna")

    assert len(book) == 100
    assert message == "you have 100 contexts, at most 100; delete some first"


@pytest.mark.parametrize(("tokens", "most"), [(1, "contexts"), (50, "tokens")])
def test_each_of_a_few_has_a_share_to_itself(tokens: int, most: str) -> None:
    """However many salts it makes up; what it is told does not depend on others."""
    alone = ContextBook(num_tenants=2, max_contexts=100, max_tokens=500)
    book = ContextBook(num_tenants=2, max_contexts=100, max_tokens=500)

    told = [fill(alone, "bert", tokens=tokens)]
    fill(book, "anna", tokens=tokens)
    told.append(fill(book, "bert", tokens=tokens))

    assert told[0] == told[1]
    assert most in told[0]
    assert len(book) == 2 * len(alone) == (100 if tokens == 1 else 10)


def test_of_many_each_may_have_a_tenth_while_there_is_room() -> None:
    """Beyond the whole bound nobody is told how many others have."""
    book = ContextBook(num_tenants=1000, max_contexts=100)
    for number in range(10):
        assert fill(book, f"tenant-{number}").startswith("you have 10 contexts, at most 10;")

    message = fill(book, "late")

    assert len(book) == 100
    assert "beside the 0 that you have" in message
    assert "100" not in message


def test_a_context_is_renewed_in_a_full_book() -> None:
    """It takes no further room; one of another owner would."""
    book = ContextBook(num_tenants=2, max_contexts=4)
    for owner in ("anna", "bert"):
        fill(book, owner)

    book.check_room(context("c0", "anna", salt="anna-0"))
    with pytest.raises(ApiError, match="you have 2 contexts"):
        book.check_room(context("c0", "bert", salt="anna-0"))
