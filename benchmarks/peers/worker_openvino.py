"""OpenVINO GenAI: its continuous batching pipeline, step by step.

Runs in the environment that `prepare` made for it. Prompts are computed by the engine itself; requests that
share a context find it in its prefix cache.
"""

from collections.abc import Sequence
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.protocol import Filled, Opening, Options, serve, sharing_within

_BLOCK_TOKENS = 32
_MOST_STEPS = 128
# Prompt tokens of one step, as kvkeep has it.
_BATCH_TOKENS = 2048


class OpenVINOEngine:
    """A pipeline whose K/V have room for `capacity_tokens`."""

    def __init__(self, options: Options) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-options.capacity_tokens // _BLOCK_TOKENS) + 1
        scheduler.max_num_batched_tokens = _BATCH_TOKENS
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = True
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": options.threads}
        if options.kv:
            properties["KV_CACHE_PRECISION"] = options.kv
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(options.model), scheduler, "CPU", properties
        )
        self.vocabulary = _vocabulary(options)
        self._kv = options.kv or "default"
        self._ids = count()
        self._handles: list[Any] = []
        self._tokens_per_s = 250.0  # until it is known

    def describe(self) -> dict[str, str]:
        return {
            "versions": f"openvino-genai {openvino_genai.__version__}, "
            f"openvino {openvino.__version__}",
            "precision": f"fp16 weights computed in bf16, {self._kv} K/V",
            "fills": "prefill",
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        outputs = []
        for ids in prompts:
            handle = self._add(ids, num_tokens)
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            outputs.append([int(token) for token in handle.read_all()[0].generated_ids])
        return outputs

    def open(self, opening: Opening) -> Filled:
        is_shared = sharing_within(opening, self._tokens_per_s)
        prompts = opening.prompts(self.vocabulary, is_shared=is_shared)
        start = perf_counter()
        if is_shared:
            self.first_token(prompts[0][:-1])
        self._handles = [self._add(ids, _MOST_STEPS) for ids in prompts]
        waiting = list(self._handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        num_computed = opening.context * (1 if is_shared else opening.batch)
        self._tokens_per_s = num_computed / (perf_counter() - start)
        how = "own prefill" + (", one for all: blocks are shared" if is_shared else "")
        metrics = self._pipeline.get_metrics()
        kv_bytes = int(metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100)
        return Filled(how=how, is_shared=is_shared, kv_bytes=kv_bytes)

    def step(self) -> None:
        self._pipeline.step()
        for handle in self._handles:
            while handle.can_read():
                handle.read()

    def close(self) -> None:
        for handle in self._handles:
            handle.stop()
        self._handles = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def warm(self, prefix: Sequence[int]) -> str:
        self.first_token(prefix)
        return "own prefill, found by its prefix cache"

    def first_token(self, prompt: Sequence[int]) -> None:
        handle = self._add(prompt, 1)  # without one the request is dropped
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        handle.read_all()

    def _add(self, ids: Sequence[int], num_tokens: int) -> Any:  # noqa: ANN401  the peer has no types
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.set_eos_token_id(0)  # it wants one, and does not end at it
        config.ignore_eos = True
        config.do_sample = False
        tokens = openvino.Tensor(np.array([ids], dtype=np.int64))
        return self._pipeline.add_request(next(self._ids), tokens, config)


def _vocabulary(options: Options) -> int:
    import json

    return int(json.loads((options.model / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    serve(OpenVINOEngine)
