"""What a model says without any cache: the truth that every cached path is compared with.

Every step encodes the whole sequence again, alone, with the model's own attention and
`use_cache=False`. That is slow and leaves nothing to go wrong. Give it a model whose attention was
not replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleRun:
    """A greedy continuation: the tokens, and the logits each was chosen from (`[token, vocab]`)."""

    token_ids: tuple[int, ...]
    logits: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """By how much each token won (`[token]`): its logit less the second highest."""
        best_two = self.logits.topk(2, dim=-1).values
        return best_two[:, 0] - best_two[:, 1]


def logits_at_all_positions(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """The logits after every token of the sequence: float32, shape `[len(token_ids), vocab]`."""
    input_ids = torch.tensor([list(token_ids)], dtype=torch.long, device=model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[0].float()


def greedy(model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int) -> OracleRun:
    """Continue `prompt_ids` (at least one token) by `num_tokens` tokens, each the most likely.

    Of equal logits the lowest token id wins. Nothing stops the text early.
    """
    sequence = list(prompt_ids)
    logits_per_token: list[torch.Tensor] = []
    for _ in range(num_tokens):
        logits = logits_at_all_positions(model, sequence)[-1]
        logits_per_token.append(logits)
        sequence.append(int(logits.argmax()))
    return OracleRun(
        token_ids=tuple(sequence[len(prompt_ids) :]),
        logits=torch.stack(logits_per_token),
    )
