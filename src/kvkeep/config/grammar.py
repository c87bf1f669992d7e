"""What an output must look like: the contract between a sampler and a library of grammars."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Grammar", "TokenMatcher"]


class TokenMatcher(Protocol):
    """Follows one output through a grammar; owned by one thread."""

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot go on, in a line; None where it can."""
        ...

    def accept(self, token_ids: Sequence[int]) -> None:
        """Follow the next tokens of the output."""
        ...

    def allowed(self) -> bytes:
        """One bit for each token id, lowest bit first: whether it may come next.

        Ids behind the last bit may not. All bits are 0 when the grammar cannot go on.
        """
        ...


class Grammar(Protocol):
    """A compiled grammar, used by many requests at once."""

    def matcher(self) -> TokenMatcher:
        """A matcher at the start of an output."""
        ...
