"""KeepCache as an object: its memory, its receipts and its hooks."""

import gc
from collections.abc import Iterator

import pytest
from transformers import DynamicCache, PreTrainedModel

from kvkeep.arena import ArenaGroups
from kvkeep.errors import CapacityError, RequestError
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


# --- memory -------------------------------------------------------------------------------


def test_memory_stays_within_capacity(model: PreTrainedModel) -> None:
    """Twenty prompts through a cache for two: old blocks make room, and every answer is right."""
    keep = KeepCache(model, capacity=150_000, block_size=BLOCK_SIZE)
    for seed in range(20):
        prompt = prompt_of(100, seed)

        assert generate(model, prompt, past_key_values=keep) == generate(model, prompt)
        stats = keep.stats()
        assert stats.capacity_bytes <= 150_000
        assert stats.in_use_bytes + stats.reusable_bytes + stats.free_bytes == stats.capacity_bytes
        assert keep.verify().problems == ()
    assert keep.stats().groups[0].num_evictions > 100
    assert known_tokens(keep, prompt_of(100, 19)) == 100
    assert known_tokens(keep, prompt_of(100, 0)) == 0


def test_a_call_that_cannot_fit_says_what_it_needs(model: PreTrainedModel) -> None:
    """The error names capacity, tokens, bytes and remedy; afterwards the cache serves what fits."""
    keep = KeepCache(model, capacity=50_000, block_size=BLOCK_SIZE)

    with pytest.raises(CapacityError) as refusal:
        generate(model, prompt_of(100), past_key_values=keep)

    assert str(refusal.value) == (
        "capacity=43 KB is 7 blocks of 8 tokens, but 1 rows of together 100 tokens need up to 13 "
        "(79.9 KB); give KeepCache more capacity, or generate with fewer rows, beams or tokens"
    )
    assert keep.stats().in_use_bytes == 0
    assert generate(model, prompt_of(40), past_key_values=keep) == generate(model, prompt_of(40))
    assert keep.verify().problems == ()


def test_a_call_that_outgrows_the_cache_is_undone(model: PreTrainedModel) -> None:
    """No room for one more token leaves the batch as it was before that token."""
    keep = KeepCache(model, capacity=50_000, block_size=BLOCK_SIZE)

    with pytest.raises(CapacityError, match="need up to 8"):
        generate(model, prompt_of(50), past_key_values=keep, max_new_tokens=20)

    assert keep.get_seq_length() == 56
    assert keep.verify().problems == ()
    assert known_tokens(keep, prompt_of(50)) == 50


def test_too_little_capacity_is_refused_at_once(model: PreTrainedModel) -> None:
    """A cache of less than two blocks is none."""
    with pytest.raises(CapacityError, match="capacity=9 KB is less than two blocks of 8 tokens"):
        KeepCache(model, capacity=9000, block_size=BLOCK_SIZE)


def test_returned_sequences_hold_their_prompt_once(model: PreTrainedModel, keep: KeepCache) -> None:
    """Eight continuations of 100 tokens take little more than one."""
    options = {"num_return_sequences": 8, "do_sample": True, "max_new_tokens": 4}
    generate(model, prompt_of(100), past_key_values=keep, **options)

    # 12 full blocks together, and a tail of one block each.
    assert keep.stats().groups[0].in_use == 12 + 8


def test_beams_hold_their_prompt_once(model: PreTrainedModel, keep: KeepCache) -> None:
    """Beams share all but their tails."""
    generate(model, prompt_of(100), past_key_values=keep, num_beams=6, max_new_tokens=4)

    assert keep.stats().groups[0].in_use <= 12 + 6


def test_reset_keeps_what_is_known(model: PreTrainedModel, keep: KeepCache) -> None:
    """The batch is let go of, its full blocks stay."""
    generate(model, prompt_of(40), past_key_values=keep)
    keep.reset()

    assert keep.get_seq_length() == 0
    assert keep.stats().in_use_bytes == 0
    assert keep.stats().reusable_bytes > 0
    assert known_tokens(keep, prompt_of(40)) == 40


def test_clear_forgets_everything(model: PreTrainedModel, keep: KeepCache) -> None:
    """The receipt counts what was forgotten."""
    generate(model, prompt_of(40), past_key_values=keep)
    receipt = keep.clear()

    assert receipt.num_blocks == 5
    assert known_tokens(keep, prompt_of(40)) == 0
    assert keep.stats().free_bytes == keep.stats().capacity_bytes


# --- receipts -----------------------------------------------------------------------------


def test_the_receipt_counts_one_call(model: PreTrainedModel, keep: KeepCache) -> None:
    """Prompt, reused and computed tokens of the last call, and what came out of it."""
    assert keep.last_receipt is None

    generate(model, prompt_of(30), past_key_values=keep)
    generate(model, prompt_of(30), past_key_values=keep, num_return_sequences=2, do_sample=True)

    receipt = receipt_of(keep)
    assert (receipt.prompt_tokens, receipt.reused_tokens, receipt.computed_tokens) == (60, 58, 2)
    assert receipt.output_tokens == 12
    assert receipt.tokens_by_source == {"device": 58, "computed": 2}
    keep.reset()
    assert keep.last_receipt == receipt


def test_candidates_are_no_part_of_the_prompt(model: PreTrainedModel, keep: KeepCache) -> None:
    """Prompt lookup feeds candidates together with the prompt."""
    prompt = prompt_of(20).repeat(1, 2)
    generate(model, prompt, past_key_values=keep, prompt_lookup_num_tokens=3)

    receipt = receipt_of(keep)
    assert (receipt.prompt_tokens, receipt.reused_tokens, receipt.output_tokens) == (40, 0, 6)


# --- hooks --------------------------------------------------------------------------------


def hooks_of(model: PreTrainedModel) -> int:
    """How many hooks the model has."""
    return len(model._forward_pre_hooks) + len(model._forward_hooks)


def num_arenas() -> int:
    """How many arenas there are; isinstance would ask strange objects strange things."""
    return sum(type(item) is ArenaGroups for item in gc.get_objects())


def test_hooks_live_as_long_as_a_cache(model: PreTrainedModel) -> None:
    """One pair for all caches of a model, gone with the last of them, and without it its attribute."""
    before = set(vars(model))
    first = KeepCache(model, capacity="4MB")
    second = KeepCache(model, capacity="4MB")
    generate(model, prompt_of(9), past_key_values=second)
    assert hooks_of(model) == 2

    first.close()
    first.close()
    assert hooks_of(model) == 2
    del second
    gc.collect()
    assert hooks_of(model) == 0
    assert set(vars(model)) == before
    with pytest.raises(RequestError, match="did not see the forward begin"):
        generate(model, prompt_of(9), past_key_values=first)


def test_memory_is_freed_with_the_cache(model: PreTrainedModel) -> None:
    """Also while a batch is held, and without waiting for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        before = num_arenas()
        keep = KeepCache(model, capacity="4MB")
        generate(model, prompt_of(40), past_key_values=keep)
        del keep
        assert num_arenas() == before
    finally:
        gc.enable()


def test_other_caches_are_left_alone(model: PreTrainedModel, keep: KeepCache) -> None:
    """A model with hooks serves forwards without KeepCache as ever, even in between."""
    prompt = prompt_of(20)
    expected = generate(build_tiny("llama"), prompt)
    forward(model, keep, prompt)
    theirs = DynamicCache(config=model.config)

    assert generate(model, prompt) == expected
    assert generate(model, prompt, past_key_values=theirs) == expected
    assert keep.get_seq_length() == 20


def test_it_says_what_it_holds(model: PreTrainedModel, keep: KeepCache) -> None:
    """The repr shows bytes; coverage wants one text."""
    forward(model, keep, prompt_of(20))

    assert repr(keep) == "KeepCache(capacity=3.99 MB, in_use=18.4 KB, reusable=0 B)"
    assert keep.coverage(prompt_of(20)[0].tolist()).known_tokens == 16
    with pytest.raises(RequestError, match=r"token_ids of shape \(2, 5\) are several texts"):
        keep.coverage(prompt_of(5, num_rows=2))
