"""The sides that are compared: kvkeep, and what transformers offers, driven the same way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

from benchmarks.harness import Run
from benchmarks.shapes import SHAPES, build_model
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.llm import LLM

__all__ = [
    "DecodeLoop",
    "EngineSteps",
    "check_mode",
    "continuous_batch",
    "exact_model",
    "generated",
    "greedy_for",
    "make_llm",
    "static_batch",
    "uncached_token",
]

# Blocks of the arena beyond what the tokens need: open tails, and what is being computed.
_SPARE_TOKENS = 4096


def exact_model(name: str) -> PreTrainedModel:
    """Two layers of a shape in float32, in which tokens can be compared: no ties flip."""
    return build_model(name, torch.float32, min(2, SHAPES[name].layers))


def make_llm(
    model: PreTrainedModel, num_tokens: int, *, spare_tokens: int = _SPARE_TOKENS, **options: Any
) -> LLM:
    """An engine over a model, with room for `num_tokens` tokens of all requests and some to spare."""
    config = model.config
    itemsize = next(model.parameters()).dtype.itemsize
    width = 2 * config.num_key_value_heads * config.head_dim * itemsize
    capacity = config.num_hidden_layers * width * (num_tokens + spare_tokens)
    return LLM(model, capacity=capacity, **options)


def greedy_for(num_tokens: int) -> SamplingParams:
    """So many most likely tokens, whatever they are."""
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)


def generated(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    cache: CacheOptions | None = None,
) -> list[list[int]]:
    """What the engine generates for the prompts, all given to it at once."""
    outputs = llm.generate([list(p) for p in prompts], greedy_for(num_tokens), cache=cache)
    return [list(output.token_ids) for output in outputs]


def check_mode(run: Run, llm: LLM) -> None:
    """Record by how much paged logits differ from the model's own, in the dtype that is measured."""
    test = llm.installed.self_test
    assert test is not None
    trial = test.trials[-1]
    assert trial.error is not None
    dtype = llm.installed.geometry.spec.dtype
    run.check(
        f"logits in {dtype} ({test.mode} mode, {test.num_tokens} tokens) differ from the model's own by",
        holds=trial.error <= test.tolerance,
        found=f"{trial.error:.2g} of the largest, within the noise of {test.tolerance:.2g}",
    )


class EngineSteps:
    """Requests in an engine, all past their prompt, decoded step by step."""

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        self._engine = llm.engine
        params = greedy_for(num_tokens)
        self._ids = [llm.engine.add(list(ids), params, CacheOptions()) for ids in prompts]
        self.tokens: dict[int, list[int]] = {request_id: [] for request_id in self._ids}
        while not all(self.tokens.values()):
            self.step()

    def step(self) -> None:
        """Compute one token of every request."""
        for piece in self._engine.step():
            self.tokens[piece.request_id] += piece.token_ids

    def close(self) -> None:
        """Give the blocks back."""
        for request_id in self._ids:
            self._engine.abort(request_id)


class DecodeLoop:
    """The loop inside `generate` with a DynamicCache, and nothing around it: the least it can take.

    `prompts` go on behind what is in `cache`, which is empty by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        cache: DynamicCache | None = None,
    ) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config) if cache is None else cache
        self.next_B1 = torch.tensor([list(ids) for ids in prompts])
        self.step()

    def step(self) -> None:
        """Compute one token of every row."""
        with torch.inference_mode():
            logits_B1V = self._model(
                input_ids=self.next_B1,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            self.next_B1 = logits_B1V.argmax(dim=-1)


def uncached_token(model: PreTrainedModel, token_ids: Sequence[int]) -> int:
    """The next token, every position computed again."""
    with torch.inference_mode():
        logits: Tensor = model(
            input_ids=torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=1
        ).logits
    return int(logits[0, -1].argmax())


def _generation_config(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)


def static_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """`generate` over prompts of one length, so that nothing is padded."""
    ids_BT = torch.tensor([list(ids) for ids in prompts])
    out_BT: Tensor = model.generate(  # type: ignore[operator]  # torch types attributes so
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        generation_config=_generation_config(num_tokens),
    )
    found: list[list[int]] = out_BT[:, ids_BT.shape[1] :].tolist()
    return found


def continuous_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    page_size: int = 256,
) -> tuple[list[list[int]], float]:
    """`generate_batch`: its tokens, and the seconds from the first request to the last token.

    Memory is given to it: left alone it takes nearly all of the machine's and spends a minute on it. Making
    and ending it is not counted.
    """
    longest = max(len(ids) for ids in prompts) + num_tokens
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=len(prompts) * (-(-longest // page_size) + 1),
        max_batch_tokens=2048,
        max_requests_per_batch=len(prompts),
    )
    outputs = model.generate_batch(  # type: ignore[operator]  # torch types attributes so
        [list(ids) for ids in prompts],
        generation_config=_generation_config(num_tokens),
        continuous_batching_config=config,
        record_timestamps=True,
        progress_bar=False,
    ).values()
    start = min(output.created_time for output in outputs)
    stop = max(output.timestamps[-1] for output in outputs)
    return [list(output.generated_tokens) for output in outputs], stop - start
