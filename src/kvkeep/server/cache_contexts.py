"""Named contexts: prompts that were computed ahead, by tenant and name."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvkeep.server.errors import ApiError

__all__ = ["Context", "ContextBook", "context_of_session", "session_of_context"]

# A context is used by a session of its own: its end forgets what nobody else uses, and labels keep its name
# over a restart.
_SESSION_PREFIX = "context:"


def session_of_context(name: str) -> str:
    """The session that uses the blocks of a context."""
    return _SESSION_PREFIX + name


def context_of_session(session: str) -> str | None:
    """The context whose session this is; None for a session of somebody's own."""
    return session.removeprefix(_SESSION_PREFIX) if session.startswith(_SESSION_PREFIX) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One context. `pin` is its pin's name in the cache, None while it is not pinned; times in seconds."""

    name: str
    salt: str | None
    token_ids: "array[int]"
    tags: tuple[str, ...]
    ttl: float | str | None
    pin: str | None
    created_at: float
    warmed_at: float


class ContextBook:
    """All contexts; bounded, so that names cannot fill the memory."""

    def __init__(self, *, max_contexts: int = 10_000, max_tokens: int = 64 * 2**20) -> None:
        self._max_contexts = max_contexts
        self._max_tokens = max_tokens
        self._contexts: dict[tuple[str | None, str], Context] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all contexts."""
        return sum(len(one.token_ids) for one in self._contexts.values())

    def check_room(self, salt: str | None, name: str, num_tokens: int) -> None:
        """Raise ApiError 413 where a context of so many tokens has no room in the book."""
        known = self._contexts.get((salt, name))
        before = 0 if known is None else len(known.token_ids)
        if known is None and len(self._contexts) >= self._max_contexts:
            raise ApiError(
                413, f"there are {len(self)} contexts already; delete some first", code="too_many"
            )
        total = self.num_tokens - before + num_tokens
        if total > self._max_tokens:
            raise ApiError(
                413,
                f"contexts would have {total} tokens together, at most {self._max_tokens}; delete some",
                code="too_many",
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
