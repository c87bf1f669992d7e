"""What the demonstration does, and the check of each part against plain transformers.

Nothing here is believed: every output is computed a second time by `model.generate` of transformers with
a cache of its own, on the same model object, and the tokens are compared.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from kvkeep.cli.demo_prompts import make_notes, question
from kvkeep.config import SamplingParams
from kvkeep.engine import Output
from kvkeep.errors import ConfigError
from kvkeep.hf.load import load_model
from kvkeep.llm import LLM, Message
from kvkeep.planning import Coverage

__all__ = ["Scene", "plain_tokens", "play"]

_LONG_PROMPT_TOKENS = 1800
_SYSTEM_PROMPT_TOKENS = 500
_NUM_SHARING = 16
_NUM_TURNS = 5
# Tokens kept free for questions and answers on a model with a short context.
_ROOM_FOR_TALK = 512
# Where the long prompt loses a block.
_HOLES = (0.2, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One line of the demonstration: what was asked, what it cost, and whether it was right.

    `asked`, `answer` and `first_token_s` are those of the last request; `plain_s` is what plain
    transformers took for the same outputs, one after another. `before` and `after` are what the cache
    knew of the prompt before and after blocks were dropped.
    """

    name: str
    story: str
    num_requests: int
    computed_tokens: int
    reused_tokens: int
    output_tokens: int
    first_token_s: float
    total_s: float
    plain_s: float
    asked: str
    answer: str
    tokens_equal: bool
    before: Coverage | None = None
    after: Coverage | None = None

    @property
    def gaps_equal(self) -> bool:
        """Whether exactly the gaps were computed; true where nothing was dropped."""
        if self.after is None:
            return True
        return self.computed_tokens == self.after.num_tokens - self.after.known_tokens

    @property
    def passed(self) -> bool:
        """Whether every check of this scene holds."""
        return self.tokens_equal and self.gaps_equal


class _Generates(Protocol):
    def generate(self, inputs: Tensor, **options: Any) -> Tensor: ...


def plain_tokens(
    model: object, prompt_ids: Sequence[int], max_tokens: int, end_ids: Collection[int]
) -> list[int]:
    """The most likely continuation by transformers' own `generate`, which knows nothing of kvkeep."""
    ids_1T = torch.tensor([list(prompt_ids)], device=getattr(model, "device", None))
    output_1T = cast(_Generates, model).generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=min(end_ids, default=0),
    )
    tokens: list[int] = output_1T[0, len(prompt_ids) :].tolist()
    return tokens


def play(model: str, dtype: str, max_tokens: int, num_threads: int | None) -> Iterator[Scene]:
    """Load `model` and play every scene, with so many threads of torch (None: as many as it has).

    Raises ConfigError for a model without tokenizer.
    """
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or num_threads_before)
    try:
        loaded = load_model(model, dtype=dtype)
        llm = LLM((loaded.model, loaded.tokenizer))
        yield from _Demonstration(llm, loaded.eos_ids, max_tokens).scenes()
    finally:
        torch.set_num_threads(num_threads_before)


class _Demonstration:
    """The scenes in order, on one model whose cache is empty at the beginning."""

    def __init__(self, llm: LLM, eos_ids: Collection[int], max_tokens: int) -> None:
        if llm.tokenizer is None:
            raise ConfigError("the model has no tokenizer, which the demonstration needs; give one")
        self._llm = llm
        self._has_template = llm.tokenizer.chat_template is not None
        self._eos_ids = eos_ids
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0)
        newline = llm.encode("\n")
        # A note ends with its line, where one token says so.
        self._line_params = replace(
            self._params, stop_token_ids=newline if len(newline) == 1 else ()
        )

    def scenes(self) -> Iterator[Scene]:
        """Play every scene."""
        self._warm_up()
        prompt_ids, asked = self._long_prompt()
        yield self._alone("cold", "A long prompt that nobody asked before.", prompt_ids, asked)
        yield self._alone(
            "warm", "The same prompt again: only its open end is computed.", prompt_ids, asked
        )
        yield self._sharing()
        yield self._conversation()
        yield self._repair(prompt_ids, asked)

    def _warm_up(self) -> None:
        """Both sides once, so that neither pays for what torch does first."""
        ids = self._llm.encode("warm: up\n")
        self._llm.generate([ids], self._line_params)
        plain_tokens(self._llm.model, ids, self._params.max_tokens, self._eos_ids)
        self._llm.cache.clear()

    def _long_prompt(self) -> tuple[list[int], str]:
        """Notes as lines, and what is asked for at their end."""
        notes = make_notes(self._num_facts(_LONG_PROMPT_TOKENS, "amber river: 4821\n"), seed=1)
        asked = f"{notes.names[len(notes.names) // 3]}:"
        return self._llm.encode(notes.as_lines() + asked), asked

    def _alone(self, name: str, story: str, prompt_ids: Sequence[int], asked: str) -> Scene:
        started_s = perf_counter()
        outputs = self._llm.generate([prompt_ids], self._line_params)
        total_s = perf_counter() - started_s
        return self._scene(name, story, outputs, self._line_params, asked, total_s)

    def _sharing(self) -> Scene:
        notes = make_notes(self._num_system_facts(), seed=2)
        names = notes.names[-_NUM_SHARING:]
        system = {"role": "system", "content": notes.as_system_prompt()}
        prompts = [
            self._encode_chat([system, {"role": "user", "content": question(name)}])
            for name in names
        ]
        started_s = perf_counter()
        outputs = self._llm.generate(prompts, self._params)
        total_s = perf_counter() - started_s
        story = f"{len(prompts)} questions at once under one system prompt: it is computed once."
        return self._scene("shared", story, outputs, self._params, question(names[-1]), total_s)

    def _conversation(self) -> Scene:
        notes = make_notes(self._num_system_facts(), seed=3)
        names = notes.names[-_NUM_TURNS:]
        messages: list[Message] = [{"role": "system", "content": notes.as_system_prompt()}]
        outputs: list[Output] = []
        started_s = perf_counter()
        for name in names:
            messages.append({"role": "user", "content": question(name)})
            outputs += self._llm.generate([self._encode_chat(messages)], self._params)
            messages.append({"role": "assistant", "content": outputs[-1].text})
        total_s = perf_counter() - started_s
        story = f"A conversation of {len(outputs)} turns: each computes what is new since the last."
        return self._scene("chat", story, outputs, self._params, question(names[-1]), total_s)

    def _repair(self, prompt_ids: Sequence[int], asked: str) -> Scene:
        cache, num_blocks = self._llm.cache, len(prompt_ids) // self._llm.settings.block_size
        before = cache.coverage(prompt_ids)
        lost = {int(share * num_blocks) for share in _HOLES} if num_blocks else set()
        cache.drop(prompt_ids, lost)
        after = cache.coverage(prompt_ids)
        story = (
            f"The long prompt after {len(lost)} of its blocks were lost: only the holes are computed, what "
            "lies behind them is still right."
        )
        return replace(self._alone("repair", story, prompt_ids, asked), before=before, after=after)

    def _scene(
        self,
        name: str,
        story: str,
        outputs: Sequence[Output],
        params: SamplingParams,
        asked: str,
        total_s: float,
    ) -> Scene:
        """The numbers of a scene, and its tokens against those of plain transformers."""
        end_ids = {*self._eos_ids, *params.stop_token_ids}
        started_s = perf_counter()
        plain = [
            plain_tokens(self._llm.model, output.prompt_ids, params.max_tokens, end_ids)
            for output in outputs
        ]
        plain_s = perf_counter() - started_s
        receipts = [output.receipt for output in outputs]
        return Scene(
            name=name,
            story=story,
            num_requests=len(outputs),
            computed_tokens=sum(receipt.computed_tokens for receipt in receipts),
            reused_tokens=sum(receipt.reused_tokens for receipt in receipts),
            output_tokens=sum(receipt.output_tokens for receipt in receipts),
            first_token_s=receipts[-1].first_token_s or 0.0,
            total_s=total_s,
            plain_s=plain_s,
            asked=asked,
            answer=outputs[-1].text.strip(),
            tokens_equal=[list(output.token_ids) for output in outputs] == plain,
        )

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation; a model without a chat template gets it as plain text."""
        if self._has_template:
            return self._llm.encode_chat(messages)
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self._llm.encode(f"{turns}assistant:")

    def _num_system_facts(self) -> int:
        return self._num_facts(_SYSTEM_PROMPT_TOKENS, "The secret code of amber river is 4821.\n")

    def _num_facts(self, num_tokens: int, line: str) -> int:
        """How many lines like `line` make `num_tokens` tokens, or as many as the model has room for."""
        room = self._llm.installed.max_context - _ROOM_FOR_TALK - self._params.max_tokens
        return max(_NUM_TURNS, min(num_tokens, room) // len(self._llm.encode(line)))
