"""vLLM on the CPU: its engine in this process, step by step.

Runs in the environment that `prepare` made for it. Prompts are computed by the engine itself; requests that
share a context find it in its prefix cache.
"""

import os
from collections.abc import Sequence
from itertools import count
from time import perf_counter

from benchmarks.peers.protocol import Filled, Opening, Options, serve, sharing_within

_MOST_STEPS = 128
_BATCH_TOKENS = 2048
_GIB = 2**30


class VLLMEngine:
    """An engine whose K/V have room for `capacity_tokens`, rounded up to whole GiB."""

    def __init__(self, options: Options) -> None:
        import vllm
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(options.model))
        self.vocabulary: int = config.vocab_size
        self._versions = f"vllm {vllm.__version__}"
        # Of bf16 keys and values.
        self._token_bytes: int = (
            4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        )
        room = -(-options.capacity_tokens * self._token_bytes // _GIB)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, room))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(options.model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=min(config.max_position_embeddings, options.capacity_tokens),
            max_num_seqs=64,
            max_num_batched_tokens=_BATCH_TOKENS,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
        ).llm_engine
        self._ids = count()
        self._running: list[str] = []
        self._tokens_per_s = 250.0  # until it is known

    def describe(self) -> dict[str, str]:
        return {
            "versions": self._versions,
            "precision": "bf16 weights, bf16 K/V",
            "fills": "prefill",
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        return [self._run(ids, num_tokens) for ids in prompts]

    def open(self, opening: Opening) -> Filled:
        is_shared = sharing_within(opening, self._tokens_per_s)
        prompts = opening.prompts(self.vocabulary, is_shared=is_shared)
        start = perf_counter()
        if is_shared:
            self.first_token(prompts[0][:-1])
        self._running = [self._add(ids, _MOST_STEPS) for ids in prompts]
        waiting = set(self._running)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        num_computed = opening.context * (1 if is_shared else opening.batch)
        self._tokens_per_s = num_computed / (perf_counter() - start)
        how = "own prefill" + (", one for all: blocks are shared" if is_shared else "")
        size = self._engine.vllm_config.cache_config.block_size
        num_blocks = opening.batch * -(-(opening.context + 2) // size)
        kv_bytes = num_blocks * size * self._token_bytes
        return Filled(how=how, is_shared=is_shared, kv_bytes=kv_bytes)

    def step(self) -> None:
        self._engine.step()

    def close(self) -> None:
        self._engine.abort_request(self._running)
        self._running = []
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def warm(self, prefix: Sequence[int]) -> str:
        self.first_token(prefix)
        return "own prefill, found by its prefix cache"

    def first_token(self, prompt: Sequence[int]) -> None:
        self._run(prompt, 1)

    def _run(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        self._add(ids, num_tokens)
        tokens: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = [int(token) for token in output.outputs[0].token_ids]
        return tokens

    def _add(self, ids: Sequence[int], num_tokens: int) -> str:
        request_id = str(next(self._ids))
        params = self._params(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(ids)}, params)
        return request_id


if __name__ == "__main__":
    # One process, so that its memory and its threads are this one's.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    serve(VLLMEngine)
