"""What one `generate` call has cost so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.cache import Receipt
from kvkeep.hf.generate_call import Incoming, Past
from kvkeep.hf.generate_rows import Started

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Counts prompt tokens, reused and computed, over all rows of a call.

    The prompt is what comes before the first forward of a single column; where candidates are
    checked, it is the first forward without its candidates.
    """

    is_generate: bool = False
    prompt_tokens: int = 0
    reused_tokens: int = 0
    _is_prompt: bool = True
    _proposed: tuple[int, int] = (0, 0)

    def propose(
        self, past: Past, incoming: Incoming, started: Started, *, checks_candidates: bool
    ) -> None:
        """A forward has begun; it counts once it is accepted."""
        if past.num_columns and (incoming.num_columns == 1 or checks_candidates):
            self._is_prompt = False
        self._proposed = (0, 0)
        if self._is_prompt:
            num_tokens = sum(len(row) for row in incoming.tokens)
            if checks_candidates and incoming.num_wanted is not None:
                num_tokens -= len(incoming.tokens) * (incoming.num_wanted - 1)
            self._proposed = (num_tokens, started.reused_tokens)

    def accept(self) -> None:
        """The forward has succeeded."""
        self.prompt_tokens += self._proposed[0]
        self.reused_tokens += self._proposed[1]

    def receipt(self, row_tokens: Sequence[int]) -> Receipt | None:
        """The receipt of a call whose rows hold so many tokens now; None before its first forward."""
        if not self.prompt_tokens:
            return None
        computed = self.prompt_tokens - self.reused_tokens
        # The token chosen last is not fed back into the model.
        num_last = len(row_tokens) if self.is_generate else 0
        return Receipt(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            computed_tokens=computed,
            output_tokens=max(0, sum(row_tokens) - self.prompt_tokens) + num_last,
            tokens_by_source={"device": self.reused_tokens, "computed": computed},
        )
