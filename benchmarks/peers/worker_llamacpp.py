"""llama.cpp: `llama_decode` with one token of every sequence.

Runs in the environment that `prepare` made for it. Contexts are put in by the state of a short sequence
that was computed, its rows repeated: every sequence has cells of its own in a stream of its own.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.llamacpp_state import SequenceState, StateFormatError, parse_state
from benchmarks.peers.protocol import OWN, Filled, Opening, Options, serve, sharing_within

# The size of a context's cells is a multiple of this.
_CELLS = 256
_MOST_STEPS = 128
_BATCH_TOKENS = 2048
_TEMPLATE_TOKENS = 32
_NAME_TO_TYPE = {"f16": 1, "q8_0": 8, "bf16": 30}
_NAME_TO_BITS = {"f16": 16, "q8_0": 8.5, "bf16": 16}


class Context:
    """A llama.cpp context of `num_sequences` sequences with `num_tokens` cells each."""

    def __init__(self, model: Any, options: Options, num_sequences: int, num_tokens: int) -> None:  # noqa: ANN401  the peer has no types
        params = llama_cpp.llama_context_default_params()
        cells = -(-num_tokens // _CELLS) * _CELLS
        params.n_ctx = cells * num_sequences
        params.n_seq_max = num_sequences
        params.kv_unified = False
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = options.threads
        name = options.kv or "f16"
        params.type_k = params.type_v = _NAME_TO_TYPE[name]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise MemoryError(f"no context of {num_sequences} x {cells} cells")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.lengths = [0] * num_sequences
        head_dim = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
        width = 2 * head_dim * llama_cpp.llama_model_n_head_kv(model)
        num_bits = width * llama_cpp.llama_model_n_layer(model) * _NAME_TO_BITS[name]
        # Of all cells, used or not.
        self.kv_bytes = int(cells * num_sequences * num_bits / 8)

    def free(self) -> None:
        """Give the memory back."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def compute(self, sequence: int, ids: Sequence[int]) -> int:
        """Compute tokens behind what a sequence has; returns the most likely next one."""
        row = 0
        for start in range(0, len(ids), _BATCH_TOKENS):
            chunk = ids[start : start + _BATCH_TOKENS]
            for row, token in enumerate(chunk):
                is_last = start + row + 1 == len(ids)
                self._put(row, token, sequence, wants_logits=is_last)
            self._decode(len(chunk))
        return self._best(row)

    def advance(self, ids: Sequence[int]) -> list[int]:
        """Compute one token of every sequence; returns the most likely next ones."""
        for sequence, token in enumerate(ids):
            self._put(sequence, token, sequence, wants_logits=True)
        self._decode(len(ids))
        return [self._best(row) for row in range(len(ids))]

    def cut(self, sequence: int, num_tokens: int) -> None:
        """Forget a sequence's tokens from `num_tokens` on."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, num_tokens, -1):
            raise RuntimeError(f"sequence {sequence} cannot be cut at {num_tokens}")
        self.lengths[sequence] = num_tokens

    def state(self, sequence: int) -> bytes:
        """What a sequence has, as llama.cpp saves it."""
        size = llama_cpp.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return bytes(buffer)[:written]

    def put_state(self, state: SequenceState, num_tokens: int) -> None:
        """Give every sequence the state's rows, over and over, up to `num_tokens`."""
        content = bytearray().join(state.grown(num_tokens))
        size = len(content)
        buffer = (ctypes.c_uint8 * size).from_buffer(content)
        for sequence in range(len(self.lengths)):
            # Which sequence the state was of does not matter.
            read = llama_cpp.llama_state_seq_set_data(self._context, buffer, size, sequence)
            last = llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)
            if read != size or last != num_tokens - 1:
                raise StateFormatError(f"read {read} of {size} bytes; last position {last}")
            self.lengths[sequence] = num_tokens

    def _put(self, row: int, token: int, sequence: int, *, wants_logits: bool) -> None:
        batch = self._batch
        batch.token[row] = token
        batch.pos[row] = self.lengths[sequence]
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wants_logits
        self.lengths[sequence] += 1

    def _decode(self, num_tokens: int) -> None:
        self._batch.n_tokens = num_tokens
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


class LlamaCppEngine:
    """The model is loaded once; each opening has a context of its own."""

    def __init__(self, options: Options) -> None:
        llama_cpp.llama_backend_init()
        self._options = options
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(options.model).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {options.model.name}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self._context: Context | None = None
        self._next: list[int] = []
        self._alone: Context | None = None
        self._prefix: list[int] = []
        self._tokens_per_s = 50.0

    def describe(self) -> dict[str, str]:
        return {
            "versions": f"llama-cpp-python {version('llama-cpp-python')}",
            "precision": f"bf16 weights, {self._options.kv or 'f16'} K/V, flash attention",
            "fills": "random",
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        context = Context(self._model, self._options, 1, max(map(len, prompts)) + num_tokens)
        outputs = []
        for ids in prompts:
            context.cut(0, 0)
            tokens = [context.compute(0, ids)]
            while len(tokens) < num_tokens:
                tokens += context.advance(tokens[-1:])
            outputs.append(tokens)
        context.free()
        return outputs

    def open(self, opening: Opening) -> Filled:
        self._forget_prefix()
        prompts = opening.prompts(self.vocabulary, is_shared=False)
        context = Context(self._model, self._options, opening.batch, opening.context + _MOST_STEPS)
        self._context = context
        try:
            state = self._template(context, prompts[0])
            context.put_state(state, opening.context)
            how = f"K/V of {_TEMPLATE_TOKENS} tokens, repeated in the cells of each sequence"
        except StateFormatError as error:
            how = self._compute(context, opening, prompts, error)
        self._next = context.advance([ids[-1] for ids in prompts])
        return Filled(how=how, is_shared=False, kv_bytes=context.kv_bytes)

    def step(self) -> None:
        assert self._context is not None
        self._next = self._context.advance(self._next)

    def close(self) -> None:
        if self._context is not None:
            self._context.free()
            self._context = None

    def warm(self, prefix: Sequence[int]) -> str:
        self._forget_prefix()
        room = len(prefix) + _MOST_STEPS
        self._alone = Context(self._model, self._options, 1, room)
        self._prefix = list(prefix)
        try:
            state = self._template(self._alone, prefix)
            self._alone.put_state(state, len(prefix))
        except StateFormatError:
            self._alone.cut(0, 0)
            self._alone.compute(0, prefix)
            return "own prefill, the sequence cut behind the prefix"
        return "K/V put in, the sequence cut behind the prefix"

    def first_token(self, prompt: Sequence[int]) -> None:
        known = len(self._prefix)
        if self._alone is not None and list(prompt[:known]) == self._prefix:
            self._alone.cut(0, known)
            self._alone.compute(0, prompt[known:])
            return
        context = Context(self._model, self._options, 1, len(prompt) + 1)
        context.compute(0, prompt)
        context.free()

    def _template(self, context: Context, ids: Sequence[int]) -> SequenceState:
        """The state of the first tokens of sequence 0, which is empty before and after."""
        context.compute(0, ids[:_TEMPLATE_TOKENS])
        state = parse_state(context.state(0))
        context.cut(0, 0)
        return state

    def _compute(
        self,
        context: Context,
        opening: Opening,
        prompts: Sequence[Sequence[int]],
        error: StateFormatError,
    ) -> str:
        """Where states are of another form, each context is computed, if there is time for it."""
        limited = replace(opening, sharing=OWN)
        sharing_within(limited, self._tokens_per_s)
        start = perf_counter()
        for sequence, ids in enumerate(prompts):
            context.cut(sequence, 0)
            context.compute(sequence, ids[:-1])
        self._tokens_per_s = opening.batch * opening.context / (perf_counter() - start)
        return f"own prefill (no state could be put in: {error})"

    def _forget_prefix(self) -> None:
        if self._alone is not None:
            self._alone.free()
        self._alone, self._prefix = None, []


if __name__ == "__main__":
    serve(LlamaCppEngine)
