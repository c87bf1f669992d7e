"""KeepCache in forwards: with and without generate(), what it shares, and what it refuses."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvkeep.errors import ConfigError, RequestError
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


# --- refusals -----------------------------------------------------------------------------


def test_training_is_refused(model: PreTrainedModel, keep: KeepCache) -> None:
    """The arena keeps no gradients."""
    with torch.enable_grad(), pytest.raises(RequestError, match="keeps no gradients"):
        model(input_ids=prompt_of(5), past_key_values=keep)
    model.train()
    with pytest.raises(RequestError, match=r"call model.eval\(\)"):
        generate(model, prompt_of(5), past_key_values=keep)
    with pytest.raises(ConfigError, match="model is in training mode"):
        KeepCache(model, capacity="4MB")


def test_settings_are_checked(model: PreTrainedModel) -> None:
    """Each error names its field."""
    with pytest.raises(ConfigError, match="block_size=0 is not a positive integer"):
        KeepCache(model, block_size=0)
    with pytest.raises(ConfigError, match="capacity='lots' is not a size"):
        KeepCache(model, capacity="lots")
    with pytest.raises(ConfigError, match="model=Linear is not a transformers model"):
        KeepCache(nn.Linear(2, 2))  # type: ignore[arg-type]  # that is the point


def test_the_end_of_a_text_alone_is_refused(model: PreTrainedModel, keep: KeepCache) -> None:
    """New tokens with a mask or positions of the whole text mean a batch that is no longer there."""
    prompt = prompt_of(20)
    generate(model, prompt, past_key_values=keep)

    mask = torch.ones(1, 30)
    mask[0, 0] = 0
    with pytest.raises(RequestError, match=r"to generate\(\) the full input_ids"):
        generate(model, prompt_of(3), attention_mask=mask, past_key_values=keep)
    with pytest.raises(RequestError, match="position_ids start at 20"):
        generate(model, prompt_of(3), position_ids=torch.arange(20, 23)[None], past_key_values=keep)
    with pytest.raises(RequestError, match="use_cache=False"):
        generate(model, prompt, use_cache=False, past_key_values=keep)


def test_padding_stays_padding(model: PreTrainedModel, keep: KeepCache) -> None:
    """What was masked in the first forward was not kept, so that it cannot be read later."""
    mask = torch.ones(1, 10)
    mask[0, :3] = 0
    positions = (torch.arange(10) - 3).clamp(min=0)[None]
    forward(model, keep, prompt_of(10), attention_mask=mask, position_ids=positions)

    with pytest.raises(RequestError, match="left padding before"):
        forward(model, keep, prompt_of(1), attention_mask=torch.ones(1, 11))
    with pytest.raises(RequestError, match="give the whole two-dimensional mask"):
        forward(model, keep, prompt_of(1))
    with pytest.raises(RequestError, match="attention_mask has 10 columns, but the batch has 11"):
        forward(model, keep, prompt_of(1), attention_mask=mask)
    with pytest.raises(RequestError, match="input_ids has 2 rows"):
        forward(model, keep, prompt_of(1, num_rows=2), attention_mask=torch.ones(2, 11))


def test_other_models_are_refused(model: PreTrainedModel, keep: KeepCache) -> None:
    """A cache belongs to one model object, whole and as it was."""
    other = build_tiny("llama", seed=1)
    with pytest.raises(RequestError, match="did not see the forward begin"):
        generate(other, prompt_of(5), past_key_values=keep)
    of_other = KeepCache(other, capacity="4MB")
    with pytest.raises(RequestError, match="made for another model object"):
        generate(other, prompt_of(5), past_key_values=keep)
    of_other.close()
    with torch.no_grad(), pytest.raises(RequestError, match="did not see the forward begin"):
        model.model(input_ids=prompt_of(5), past_key_values=keep)
    model.double()
    with pytest.raises(RequestError, match=r"keys are torch.float64 on cpu, .* torch.float32"):
        generate(model, prompt_of(5), past_key_values=keep)


def test_a_recurrent_state_cannot_be_cropped() -> None:
    """What a state has seen cannot be taken out of it."""
    model = build_tiny("qwen3_next")
    keep = KeepCache(model, capacity="4MB", block_size=BLOCK_SIZE)
    forward(model, keep, prompt_of(10))

    with pytest.raises(RequestError, match=r"crop\(-2\) on a model with recurrent states"):
        keep.crop(-2)
    assert keep.get_seq_length() == 10


def test_a_copy_is_refused(keep: KeepCache) -> None:
    """Nobody needs one, and it would copy the model."""
    with pytest.raises(RequestError, match="cannot be copied and need not be"):
        copy.deepcopy(keep)
