"""Named contexts: prompts that were computed ahead, by tenant and name."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kvkeep.server.errors import ApiError

__all__ = ["Context", "ContextBook", "context_of_session", "session_of_context"]

# A context is used by a session of its own: its end forgets what nobody else uses, and labels keep its name
# over a restart.
_SESSION_PREFIX = "context:"
_MOST_SHARES = 10


def session_of_context(name: str) -> str:
    """The session that uses the blocks of a context."""
    return _SESSION_PREFIX + name


def context_of_session(session: str) -> str | None:
    """The context whose session this is; None for a session of somebody's own."""
    return session.removeprefix(_SESSION_PREFIX) if session.startswith(_SESSION_PREFIX) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One context. `pin` is its pin's name in the cache, None while it is not pinned; times in seconds.

    `owner` is the tenant whose share of all contexts it takes; None where that was not written down.
    """

    name: str
    salt: str | None
    token_ids: "array[int]"
    tags: tuple[str, ...]
    ttl: float | str | None
    pin: str | None
    created_at: float
    warmed_at: float
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class _Room:
    num_contexts: int
    num_tokens: int


class ContextBook:
    """All contexts; bounded, so that names cannot fill the memory.

    Each of a few tenants has an equal share to itself; each of many may have as much as one of ten.
    """

    def __init__(
        self,
        *,
        num_tenants: int = 1,
        max_contexts: int = 10_000,
        max_tokens: int = 64 * 2**20,
    ) -> None:
        num_shares = min(num_tenants, _MOST_SHARES)
        self._all = _Room(max_contexts, max_tokens)
        self._share = _Room(max_contexts // num_shares, max_tokens // num_shares)
        self._contexts: dict[tuple[str | None, str], Context] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all contexts."""
        return sum(len(one.token_ids) for one in self._contexts.values())

    def check_room(self, context: Context) -> None:
        """Raise ApiError 413 where a context has no room in the book, or in its owner's share.

        The message tells of the owner's contexts alone.
        """
        place = (context.salt, context.name)
        others = [one for known, one in self._contexts.items() if known != place]
        own = _room_of(one for one in others if one.owner == context.owner)
        num_tokens = own.num_tokens + len(context.token_ids)
        if own.num_contexts >= self._share.num_contexts:
            raise _too_many(
                f"you have {own.num_contexts} contexts, at most {self._share.num_contexts}; delete some first"
            )
        if num_tokens > self._share.num_tokens:
            raise _too_many(
                f"your contexts would have {num_tokens} tokens together, at most {self._share.num_tokens}; "
                "delete some first"
            )
        total = _room_of(others)
        is_full = total.num_contexts >= self._all.num_contexts
        if is_full or total.num_tokens + len(context.token_ids) > self._all.num_tokens:
            raise _too_many(
                f"there is no room for another context beside the {own.num_contexts} that you have, and "
                "those of others; delete some of yours, or try again later"
            )

    def put(self, context: Context) -> Context:
        """Enter a context, in place of one of the same salt and name, whose age it takes over."""
        known = self.find(context.salt, context.name)
        if known is not None:
            context = replace(context, created_at=known.created_at)
        self._contexts[context.salt, context.name] = context
        return context

    def find(self, salt: str | None, name: str) -> Context | None:
        """The context, None where there is none."""
        return self._contexts.get((salt, name))

    def get(self, salt: str | None, name: str) -> Context:
        """The context. Raises ApiError 404 where there is none."""
        found = self.find(salt, name)
        if found is None:
            raise ApiError(
                404,
                f"there is no context {name!r:.200}; list them to see their names",
                code="unknown",
            )
        return found

    def remove(self, salt: str | None, name: str) -> None:
        """Take a context out, if it is there."""
        self._contexts.pop((salt, name), None)

    def all(self, salts: tuple[str | None, ...]) -> Iterator[Context]:
        """Contexts of these salts, of all where none is given, by name."""
        for _, context in sorted(self._contexts.items(), key=lambda item: item[0][1]):
            if not salts or context.salt in salts:
                yield context


def _room_of(contexts: Iterable[Context]) -> _Room:
    sizes = [len(one.token_ids) for one in contexts]
    return _Room(len(sizes), sum(sizes))


def _too_many(message: str) -> ApiError:
    return ApiError(413, message, code="too_many")
