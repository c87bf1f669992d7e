"""KeepCache in forwards: with and without generate(), and what it shares."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvkeep.arena import Arena, Slots
from kvkeep.errors import RequestError
from kvkeep.hf.generate_cache import KeepCache
from kvkeep.testing.tiny_models import build_tiny
from tests.generate_calls import (
    forward,
    generate,
    known_tokens,
    poison_freed_blocks,
    prompt_of,
    receipt_of,
)

BLOCK_SIZE = 8


@pytest.fixture
def model() -> PreTrainedModel:
    """A small dense model of its own, because some tests change it."""
    return build_tiny("llama")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill freed blocks with NaN."""
    poison_freed_blocks(monkeypatch)


@pytest.fixture
def keep(model: PreTrainedModel) -> Iterator[KeepCache]:
    """A cache of the model; afterwards its bookkeeping is right and nothing is held."""
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    yield keep
    keep.reset()
    assert keep.stats().in_use_bytes == 0
    assert keep.verify().problems == ()


# --- forwards without generate() ----------------------------------------------------------


def test_forwards_grow_one_batch(model: PreTrainedModel, keep: KeepCache) -> None:
    """Without generate() it is an ordinary cache that grows, in any chunks."""
    theirs = DynamicCache(config=model.config)
    for num_tokens in (11, 1, 7, 1, 1):
        ids_BT = prompt_of(num_tokens, seed=num_tokens, num_rows=2)
        torch.testing.assert_close(
            forward(model, keep, ids_BT), forward(model, theirs, ids_BT), atol=1e-5, rtol=1e-5
        )
    assert keep.get_seq_length() == 21
    assert keep.batch_size == 2


def test_a_forward_that_wants_all_logits_gets_them(model: PreTrainedModel, keep: KeepCache) -> None:
    """Known columns are skipped only where the caller reads the last outputs alone."""
    prompt = prompt_of(30)
    generate(model, prompt, past_key_values=keep)
    for options, num_logits in (({}, 30), ({"logits_to_keep": 3}, 3)):
        keep.reset()
        found = forward(model, keep, prompt, **options)

        assert found.shape[1] == num_logits
        expected = forward(model, DynamicCache(config=model.config), prompt)[:, -num_logits:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert receipt_of(keep).reused_tokens == 27


def test_generate_returns_every_hidden_state_asked_for(
    model: PreTrainedModel, keep: KeepCache
) -> None:
    """Hidden states of known columns are computed when they are to be returned."""
    prompt = prompt_of(30)
    generate(model, prompt, past_key_values=keep)
    generator: Any = model
    out = generator.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=keep,
        max_new_tokens=2,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )

    assert out.hidden_states[0][0].shape[1] == 30


def test_positional_arguments_are_seen(model: PreTrainedModel, keep: KeepCache) -> None:
    """`model(ids, mask, positions, cache)` is the same forward."""
    prompt = prompt_of(20)
    with torch.no_grad():
        model(prompt, torch.ones_like(prompt), torch.arange(20)[None], keep)

    assert keep.get_seq_length() == 20
    assert known_tokens(keep, prompt) == 16


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_inference_mode_and_generate_alternate(name: str) -> None:
    """What one mode has written, the other continues."""
    model = build_tiny(name)
    with torch.inference_mode():
        keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
        forward_ids = prompt_of(24)
        model(input_ids=forward_ids, past_key_values=keep)
    longer = torch.cat([forward_ids, prompt_of(6, seed=1)], dim=1)

    assert generate(model, longer, past_key_values=keep) == generate(model, longer)
    assert receipt_of(keep).reused_tokens == 24


def test_rows_can_be_repeated_and_chosen(model: PreTrainedModel, keep: KeepCache) -> None:
    """Decoding strategies of others do so with a batch."""
    theirs = DynamicCache(config=model.config)
    prompt, step = prompt_of(13, num_rows=2), prompt_of(1, num_rows=3)
    for cache in (keep, theirs):
        forward(model, cache, prompt)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))

    torch.testing.assert_close(
        forward(model, keep, step), forward(model, theirs, step), atol=1e-5, rtol=1e-5
    )


def test_a_crop_reaches_into_published_blocks(model: PreTrainedModel, keep: KeepCache) -> None:
    """What others may share is copied before other tokens are written over it."""
    prompt, other = prompt_of(20), prompt_of(9, seed=5)
    theirs = DynamicCache(config=model.config)
    for cache in (keep, theirs):
        forward(model, cache, prompt)
        cache.crop(-7)
    found, expected = forward(model, keep, other), forward(model, theirs, other)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert known_tokens(keep, prompt) == 16
    assert generate(model, prompt, past_key_values=keep) == generate(model, prompt)
    with pytest.raises(RequestError, match="tokens_to_remove=3 is positive"):
        keep.crop(3)


# --- what is shared, and what is not ------------------------------------------------------


def test_embeddings_are_cached_but_not_shared(model: PreTrainedModel, keep: KeepCache) -> None:
    """Without token ids nothing can be found again, and nothing is published."""
    embeds: Any = model.get_input_embeddings()
    inputs_embeds = embeds(prompt_of(20))

    found = generate(model, inputs_embeds=inputs_embeds, past_key_values=keep)

    assert found == generate(model, inputs_embeds=inputs_embeds)
    assert keep.stats().reusable_bytes == 0
    keep.reset()
    assert keep.stats().reusable_bytes == 0


def test_a_mask_with_holes_is_obeyed_and_not_shared(
    model: PreTrainedModel, keep: KeepCache
) -> None:
    """A token that does not see all before it has other keys and values."""
    prompt = prompt_of(20)
    mask = torch.ones_like(prompt)
    mask[0, 5:9] = 0

    found = generate(model, prompt, attention_mask=mask, past_key_values=keep)

    assert found == generate(model, prompt, attention_mask=mask)
    assert known_tokens(keep, prompt) == 0


def test_other_positions_are_not_shared(model: PreTrainedModel, keep: KeepCache) -> None:
    """Keys at position 100 are not those at position 0."""
    prompt = prompt_of(20)
    forward(model, keep, prompt, position_ids=torch.arange(100, 120)[None])

    assert known_tokens(keep, prompt) == 0


def test_what_follows_unknown_content_is_not_shared(
    model: PreTrainedModel, keep: KeepCache
) -> None:
    """A batch that begins with known tokens is published up to where it stops being known."""
    first, second = prompt_of(10), prompt_of(20, seed=1)
    forward(model, keep, first)
    forward(model, keep, second, position_ids=torch.arange(50, 70)[None])
    forward(model, keep, second, position_ids=torch.arange(30, 50)[None])

    assert known_tokens(keep, torch.cat([first, second, second], dim=1)) == 8


def test_rows_share_what_all_of_them_know(model: PreTrainedModel, keep: KeepCache) -> None:
    """The row that knows least decides where the forward begins."""
    long, short = prompt_of(40), prompt_of(40, seed=1)
    generate(model, long, past_key_values=keep)
    generate(model, short[:, :16], past_key_values=keep, max_new_tokens=1)
    both = torch.cat([long, short])

    assert generate(model, both, past_key_values=keep) == generate(model, both)
    assert receipt_of(keep).reused_tokens == 2 * 16


def test_a_row_may_evict_what_another_would_have_shared(model: PreTrainedModel) -> None:
    """Where sharing for one row takes another row's blocks, both are computed instead."""
    keep = KeepCache(model, capacity=9 * 6144 + 100, block_size=BLOCK_SIZE)
    evicted, sharing = prompt_of(24), prompt_of(24, seed=1)
    for prompt in (evicted, sharing, prompt_of(16, seed=2)):
        generate(model, prompt, past_key_values=keep, max_new_tokens=1)
    keep.reset()
    assert keep.stats().free_bytes == 0
    both = torch.cat([sharing, evicted])
    both[0, 20:] = 1  # a block of which a beginning is known: it is copied

    assert generate(model, both, past_key_values=keep) == generate(model, both)
    assert receipt_of(keep).reused_tokens == 0
    assert keep.verify().problems == ()


def test_shared_blocks_are_not_written(
    model: PreTrainedModel, keep: KeepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token of a known prompt is computed for its logits, its block is left alone."""
    prompt = prompt_of(32)
    generate(model, prompt, past_key_values=keep)
    num_written = []
    write = Arena.write

    def counting(arena: Arena, layer: int, slots: Slots, *parts: Tensor) -> None:
        num_written.append(slots.blocks_T.numel())
        write(arena, layer, slots, *parts)

    monkeypatch.setattr(Arena, "write", counting)
    generate(model, prompt, past_key_values=keep, max_new_tokens=2)

    assert num_written == [0] * 3 + [1] * 3
    assert receipt_of(keep).reused_tokens == 31


def test_states_of_different_calls_make_one_batch() -> None:
    """Assisted calls record more of a convolution's past than others; what is kept is the same."""
    model = build_tiny("lfm2")
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    prompts = [prompt_of(24, seed) for seed in (0, 1)]
    generate(model, prompts[0], past_key_values=keep, prompt_lookup_num_tokens=3)
    generate(model, prompts[1], past_key_values=keep)
    longer = torch.cat([torch.cat(prompts), prompt_of(6, num_rows=2)], dim=1)

    assert generate(model, longer, past_key_values=keep) == generate(model, longer)
    assert receipt_of(keep).reused_tokens == 48


def test_states_that_have_seen_padding_are_not_shared() -> None:
    """A recurrent state of a padded row is for that batch alone."""
    model = build_tiny("qwen3_next")
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    prompt = prompt_of(20)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    text = generate(model, prompt, attention_mask=mask, past_key_values=keep, max_new_tokens=12)

    assert text == generate(model, prompt, attention_mask=mask, max_new_tokens=12)
    assert known_tokens(keep, torch.tensor(text)[:, 3:]) == 0


def test_what_depends_on_the_rest_of_the_batch_is_not_shared() -> None:
    """Beyond the original context the frequencies of longrope follow the longest row."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    changes = {
        "rope_parameters": {**rope, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32,
    }
    model = build_tiny("phi3", changes=changes)
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    forward(model, keep, prompt_of(40))
    assert known_tokens(keep, prompt_of(40)) == 0

    keep.reset()
    forward(model, keep, prompt_of(24))
    assert known_tokens(keep, prompt_of(40)) == 24


def test_new_weights_empty_the_cache(model: PreTrainedModel, keep: KeepCache) -> None:
    """A step of training between two calls makes all that is known worthless."""
    prompt = prompt_of(30)
    generate(model, prompt, past_key_values=keep)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)

    assert generate(model, prompt, past_key_values=keep) == generate(model, prompt)
    assert receipt_of(keep).reused_tokens == 0


class _FailingLayer(nn.Module):
    """A layer that raises."""

    def forward(self, *_args: object, **_kwargs: object) -> Tensor:
        raise ArithmeticError("a layer failed")


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_forward_that_fails_midway_publishes_nothing(name: str) -> None:
    """The batch is as before it; a recurrent state is not, which is said."""
    model = build_tiny(name)
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    first, second = prompt_of(10), prompt_of(20, seed=1)
    forward(model, keep, first)
    whole, layers = torch.cat([first, second], dim=1), model.model.layers
    layer, layers[2] = layers[2], _FailingLayer()
    with pytest.raises(ArithmeticError):
        forward(model, keep, second)
    layers[2] = layer

    assert keep.get_seq_length() == 10
    assert known_tokens(keep, whole) == 8 * (name == "llama")
    assert keep.verify().problems == ()
    if name == "qwen3_next":
        for _ in range(2):
            with pytest.raises(RequestError, match="left a recurrent state undefined"):
                forward(model, keep, second)
        keep.reset()
        second = whole
    theirs = DynamicCache(config=model.config)
    expected = forward(model, theirs, whole)[:, -1]
    torch.testing.assert_close(forward(model, keep, second)[:, -1], expected, atol=1e-4, rtol=1e-4)
    known = known_tokens(keep, torch.cat([whole, second], dim=1))
    assert known == (24 if name == "llama" else 0)
