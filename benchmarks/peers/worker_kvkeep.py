"""kvkeep itself, driven like its peers.

Legend: S positions, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvkeep
from benchmarks.peers.protocol import ONE, Filled, Opening, Options, serve
from benchmarks.sides import EngineSteps, generated
from kvkeep.arena import Slots
from kvkeep.llm import LLM
from kvkeep.spec import KVFormat, Span

_HOW = "random K/V"
# No opening takes more steps.
_MOST_STEPS = 128


class KVKeepEngine:
    """One engine whose arena holds `capacity_tokens`."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(str(options.model), dtype=torch.bfloat16)
        assert isinstance(model, PreTrainedModel)
        config = model.config
        vector = KVFormat(options.kv or "bfloat16").vector_bytes(config.head_dim)
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * vector
        # With random weights there is nothing to probe: every layer has the format.
        formats: dict[str, Any] = (
            {"kv_format": options.kv, "kv_exact_layers": ()} if options.kv else {}
        )
        self._llm = LLM(model, capacity=width * options.capacity_tokens, **formats)
        self.vocabulary: int = config.vocab_size
        self._kv = options.kv or "bf16"
        self._steps: EngineSteps | None = None

    def describe(self) -> dict[str, str]:
        return {
            "versions": f"kvkeep {kvkeep.__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
            "precision": f"bf16 weights, {self._kv} K/V",
            "fills": "random",
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        return [generated(self._llm, [ids], num_tokens)[0] for ids in prompts]

    @torch.inference_mode()
    def open(self, opening: Opening) -> Filled:
        is_shared = opening.sharing == ONE and opening.batch > 1
        prompts = opening.prompts(self.vocabulary, is_shared=is_shared)
        contexts = [ids[:-1] for ids in prompts]
        self._fill(contexts[:1] if is_shared else contexts, opening.seed)
        self._steps = EngineSteps(self._llm, prompts, _MOST_STEPS)
        kv_bytes = self._llm.cache.stats().in_use_bytes
        return Filled(how=_HOW, is_shared=is_shared, kv_bytes=kv_bytes)

    def step(self) -> None:
        assert self._steps is not None
        self._steps.step()

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._llm.cache.clear()

    @torch.inference_mode()
    def warm(self, prefix: Sequence[int]) -> str:
        self._llm.cache.clear()
        self._fill([list(prefix)], 0)
        return f"{_HOW}, found by the prefix cache"

    def first_token(self, prompt: Sequence[int]) -> None:
        generated(self._llm, [prompt], 1)

    def _fill(self, contexts: Sequence[list[int]], seed: int) -> None:
        """Put random K/V into the cache as what it knows of the contexts, all of one length."""
        cache, spans = self._llm.engine.cache, [Span(0, len(contexts[0]))]
        leases = []
        for ids in contexts:
            lease = cache.reserve(self._llm.engine.chain(ids), read=False)
            if lease is None or not cache.extend(lease, spans):
                raise MemoryError(f"no room for {len(contexts)} contexts of {len(ids)} tokens")
            leases.append(lease)
        self._write([lease.tables[0].held() for lease in leases], len(contexts[0]), seed)
        for lease in leases:
            cache.commit(lease, spans)
            lease.release()

    def _write(self, tables: Sequence[Sequence[int]], num_positions: int, seed: int) -> None:
        """Each context has the same random rows as the one before it, one position further."""
        installed, size = self._llm.installed, self._llm.settings.block_size
        spec, arena = installed.geometry.spec.groups[0], installed.arenas.arenas[0]
        generator = torch.Generator().manual_seed(seed)
        position_S = torch.arange(num_positions)
        slots = [
            Slots(torch.tensor(table)[position_S // size], position_S % size) for table in tables
        ]
        for layer in range(len(spec.layers)):
            k_SKD, v_SKD = (
                torch.randn(num_positions, heads, dim, generator=generator).bfloat16()
                for heads, dim in ((spec.k_heads, spec.k_dim), (spec.v_heads, spec.v_dim))
            )
            for row, of_row in enumerate(slots):
                arena.write(layer, of_row, k_SKD.roll(row, dims=0), v_SKD.roll(row, dims=0))


if __name__ == "__main__":
    serve(KVKeepEngine)
