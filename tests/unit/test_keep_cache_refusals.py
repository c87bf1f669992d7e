"""What KeepCache refuses, and how it says so."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kvkeep.errors import ConfigError, RequestError
from kvkeep.hf.generate_cache import KeepCache
from kvkeep.testing.tiny_models import build_tiny
from tests.generate_calls import (
    forward,
    generate,
    poison_freed_blocks,
    prompt_of,
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
