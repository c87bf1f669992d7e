"""generate() with a KeepCache against generate() with transformers' own cache: the same tokens.

The matrix is {every tiny architecture} x {greedy, sampling, beams, prompt lookup, assisted, left padding,
chunked prefill} x {cold, warm}. Freed blocks hold NaN throughout, so that reading what nobody wrote shows up.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvkeep.hf.generate_cache import KeepCache
from kvkeep.testing.tiny_models import ARCHITECTURES, build_tiny
from tests.generate_calls import (
    PAD_LENGTHS,
    generate,
    left_padded,
    poison_freed_blocks,
    prompt_of,
    receipt_of,
)

BLOCK_SIZE = 8
PROMPT_TOKENS = 29
NEW_TOKENS = 6  # as many as `generate` asks for
# What generate() leaves behind of the first prompt: the blocks that its last forward has filled.
KNOWN_TOKENS = (PROMPT_TOKENS + NEW_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
# Their states can be resumed only where a forward has ended on a block's boundary.
RECURRENT = {"qwen3_next", "lfm2"}
# Their K/V of a padded row may depend on the padding, so that such batches are not shared.
UNSHARED_WHEN_PADDED = {"llama4", "bloom", *RECURRENT}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@cache
def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    """One of the tiny models, built once."""
    return build_tiny(name, seed=seed)


def check(keep: KeepCache, name: str, ids_BT: Tensor, **options: Any) -> Tensor:
    """generate() with and without `keep` agrees; returns the tokens."""
    expected = generate(model_of(name), ids_BT, **options)
    found = generate(model_of(name), ids_BT, past_key_values=keep, **options)

    assert found == expected
    assert keep.verify().problems == ()
    return torch.tensor(expected)


@pytest.fixture
def keep(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeepCache]:
    """An empty cache of the test's model; afterwards nothing is held and nothing is wrong."""
    poison_freed_blocks(monkeypatch)
    keep = KeepCache(model_of(name), capacity="4MB", block_size=BLOCK_SIZE)
    yield keep
    keep.reset()
    assert keep.stats().in_use_bytes == 0
    assert keep.verify().ok
    keep.close()


@every_architecture
def test_greedy_search_computes_only_what_is_new(name: str, keep: KeepCache) -> None:
    """A longer prompt continues from the blocks of the call before; the same one from its last token."""
    first = check(keep, name, prompt_of(PROMPT_TOKENS, seed=0))
    assert receipt_of(keep).reused_tokens == 0

    longer = torch.cat([first, prompt_of(10, seed=1)], dim=1)
    check(keep, name, longer)
    assert receipt_of(keep).reused_tokens == KNOWN_TOKENS

    check(keep, name, longer)
    assert receipt_of(keep).reused_tokens == (
        KNOWN_TOKENS if name in RECURRENT else longer.shape[1] - 1
    )


@every_architecture
def test_sampling_draws_the_same_tokens(name: str, keep: KeepCache) -> None:
    """Several returned sequences from one random state, cold and warm."""
    prompt = prompt_of(PROMPT_TOKENS, seed=0)
    for _ in range(2):
        check(keep, name, prompt, do_sample=True, num_return_sequences=3)

    assert receipt_of(keep).reused_tokens == (0 if name in RECURRENT else 3 * (PROMPT_TOKENS - 1))


@every_architecture
def test_beams_fork_and_join(name: str, keep: KeepCache) -> None:
    """Rows are reordered with duplicates after every token, cold and warm."""
    prompt = prompt_of(PROMPT_TOKENS, seed=0)
    for _ in range(2):
        check(keep, name, prompt, num_beams=3)

    assert receipt_of(keep).reused_tokens == (0 if name in RECURRENT else 3 * (PROMPT_TOKENS - 1))


@every_architecture
def test_candidates_that_are_refused_are_taken_back(name: str, keep: KeepCache) -> None:
    """Prompt lookup and a draft model, on a prompt that repeats itself, cold and warm."""
    if model_of(name)._is_stateful:
        pytest.skip("transformers refuses assisted generation with models that carry a state")
    prompt = prompt_of(PROMPT_TOKENS, seed=0).repeat(1, 2)
    for _ in range(2):
        check(keep, name, prompt, prompt_lookup_num_tokens=3)
    check(keep, name, prompt, assistant_model=model_of(name, seed=1))

    full_blocks = prompt.shape[1] // BLOCK_SIZE * BLOCK_SIZE
    assert receipt_of(keep).reused_tokens >= (0 if name in RECURRENT else full_blocks)


def full_block_counts(length: int) -> range:
    """What may be known of a text whose full blocks are: some tokens of the last block, too."""
    return range(length // BLOCK_SIZE * BLOCK_SIZE, length + 1)


@every_architecture
def test_left_padding_changes_nothing(name: str, keep: KeepCache) -> None:
    """Rows of three lengths; what they know is found in spite of their padding."""
    ids_BT, mask_BT = left_padded()
    for _ in range(2):
        check(keep, name, ids_BT, attention_mask=mask_BT)

    shared = sum(PAD_LENGTHS) - len(PAD_LENGTHS)
    assert receipt_of(keep).reused_tokens == (0 if name in UNSHARED_WHEN_PADDED else shared)
    for row, length in enumerate(PAD_LENGTHS):
        known = keep.coverage(ids_BT[row, -length:]).known_tokens
        assert known in ([0] if name in UNSHARED_WHEN_PADDED else full_block_counts(length))
    check(keep, name, ids_BT, attention_mask=mask_BT, num_beams=2)


@every_architecture
def test_chunked_prefill_skips_known_chunks(name: str, keep: KeepCache) -> None:
    """Every chunk is looked up by itself; padding may be longer than a chunk."""
    prompt = prompt_of(PROMPT_TOKENS + 4, seed=0)
    for _ in range(2):
        check(keep, name, prompt, prefill_chunk_size=7)
    ids_BT, mask_BT = left_padded()
    check(keep, name, ids_BT, attention_mask=mask_BT, prefill_chunk_size=7)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
    "left padding": {},
}


def _record(monkeypatch: pytest.MonkeyPatch, kind: type[Cache]) -> list[Tensor]:
    """A list of the keys and values that `update` of a cache class will return."""
    returned: list[Tensor] = []
    update = kind.update

    def recording(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = update(*args, **kwargs)
        returned.extend([key.clone(), value.clone()])
        return key, value

    monkeypatch.setattr(kind, "update", recording)
    return returned


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama"])
def test_every_layer_gets_the_values_that_a_dynamic_cache_gives(
    name: str, strategy: str, keep: KeepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every forward of a cold and of a warm call."""
    ids_BT, options = prompt_of(PROMPT_TOKENS, seed=0), STRATEGIES[strategy]
    pads = [0]
    if strategy == "prompt lookup":
        ids_BT = ids_BT.repeat(1, 2)
    if strategy == "left padding":
        ids_BT, mask_BT = left_padded()
        options = {"attention_mask": mask_BT}
        pads = [mask_BT.shape[1] - length for length in PAD_LENGTHS]
    model = model_of(name)
    true_parts = _record(monkeypatch, DynamicCache)
    generate(model, ids_BT, past_key_values=DynamicCache(config=model.config), **options)
    for _ in range(2):
        parts = _record(monkeypatch, KeepCache)
        generate(model, ids_BT, past_key_values=keep, **options)

        for part, true_part in zip(parts, true_parts, strict=True):
            assert part.shape == true_part.shape
            assert part.isfinite().all()
            for row, pad in enumerate(pads * (len(part) // len(pads))):
                torch.testing.assert_close(part[row, :, pad:], true_part[row, :, pad:])


@pytest.mark.parametrize("name", ["llama"])
def test_padding_columns_are_zeros(name: str, keep: KeepCache) -> None:
    """A model never meets what an earlier owner of a block has left."""
    ids_BT, mask_BT = left_padded()
    generate(model_of(name), ids_BT, attention_mask=mask_BT, past_key_values=keep)

    for row, length in enumerate(PAD_LENGTHS):
        pad = mask_BT.shape[1] - length
        for part in keep.dense(0) or ():
            assert (part[row, :, :pad] == 0).all()
            assert (part[row, :, pad:] != 0).any(dim=-1).all()
