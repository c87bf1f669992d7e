"""The self-test refuses a mode that is wrong: each part of attention is broken once."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.arena import StateArena
from kvkeep.attention import AttentionTerms, GatherAttention, inputs
from kvkeep.errors import UnsupportedModelError
from kvkeep.hf import hooks, paged_model
from kvkeep.hf.geometry import ModelGeometry, measure_geometry
from kvkeep.hf.latent_cache import find_expansions
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.selftest import choose_mode
from kvkeep.hf.step_cache import PackedStepCache
from kvkeep.native import Kernels, load_kernels
from kvkeep.spec import GroupSpec, LayerKind, Span
from kvkeep.testing.tiny_models import build_tiny

# The largest error that passes is 1e-4 of the largest logit; what is broken differs by far more.
REFUSED = r"paged logits differ from the model's own by more than [\d.e-]+ of the largest"


def measured(name: str) -> tuple[PreTrainedModel, ModelGeometry]:
    """A tiny model and its geometry."""
    model = build_tiny(name)
    return model, measure_geometry(model, 8)


def with_window(geometry: ModelGeometry, change: int) -> ModelGeometry:
    """The geometry with every window longer by `change`."""
    groups = tuple(
        group if group.window is None else replace(group, window=group.window + change)
        for group in geometry.spec.groups
    )
    return replace(geometry, spec=replace(geometry.spec, groups=groups))


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "cohere2", "gpt_oss", "llama4"])
def test_a_window_or_chunk_that_is_off_by_one_is_refused(name: str, change: int) -> None:
    """One position too many or too few shows, also where other layers read everything."""
    model, geometry = measured(name)
    assert choose_mode(model, geometry, "native").mode is Mode.NATIVE

    with pytest.raises(UnsupportedModelError, match=rf"{REFUSED} \(native: error "):
        choose_mode(model, with_window(geometry, change), "native")


def terms_without(field: str) -> Callable[..., AttentionTerms]:
    """AttentionTerms that lose a field."""

    def make(**terms: Any) -> AttentionTerms:
        return AttentionTerms(**(terms | {field: None}))

    return make


@pytest.mark.parametrize(("name", "field"), [("gemma2", "softcap"), ("gpt_oss", "sinks_H")])
def test_a_term_that_is_left_out_is_refused(
    name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softcap and sinks change the logits by more than rounding does."""
    model, geometry = measured(name)
    monkeypatch.setattr(hooks, "AttentionTerms", terms_without(field))

    with pytest.raises(UnsupportedModelError, match=rf"{REFUSED} \(native: error "):
        choose_mode(model, geometry, "native")


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_layers_that_reuse_the_kv_of_the_wrong_layer_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each consumer is sent to the other one's source."""
    model, geometry = measured(name)
    first, second = sorted(geometry.consumers)
    swapped = geometry.places | {
        first: geometry.places[second],
        second: geometry.places[first],
    }

    with pytest.raises(UnsupportedModelError, match=r"native: (error|RuntimeError)"):
        choose_mode(model, replace(geometry, places=swapped), "native")


def test_latents_in_the_wrong_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA models get back what they stored; here the rotated parts are another token's."""
    model, geometry = measured("deepseek_v3")
    read = PackedStepCache.read
    assert choose_mode(model, geometry).mode is Mode.GATHER

    def read_wrongly(cache: PackedStepCache, layer: int) -> tuple[Tensor, Tensor]:
        latents, rotated = read(cache, layer)
        return latents, rotated.roll(1, dims=2)

    monkeypatch.setattr(PackedStepCache, "read", read_wrongly)
    with pytest.raises(UnsupportedModelError, match=rf"{REFUSED} \(gather: error "):
        choose_mode(model, geometry, "gather")


def test_an_expansion_of_another_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA in the mode that absorbs the expansion; without kernels there is no such mode."""
    model, geometry = measured("deepseek_v3")
    kernels = load_kernels()
    with pytest.raises(
        UnsupportedModelError, match=r"latent: UnsupportedModelError: .*CPU kernels"
    ):
        choose_mode(model, geometry, "latent")
    if not isinstance(kernels, Kernels):
        pytest.skip("the compiled kernels are not installed")
    assert choose_mode(model, geometry, kernels=kernels).mode is Mode.LATENT

    def find_wrongly(*of: Any) -> dict[int, Tensor]:
        right = find_expansions(*of)
        return dict(zip(right, reversed(right.values()), strict=True))

    monkeypatch.setattr(paged_model, "find_expansions", find_wrongly)
    with pytest.raises(UnsupportedModelError, match=rf"{REFUSED} \(latent with kernels: error "):
        choose_mode(model, geometry, "latent", kernels)


def test_latents_are_for_mla_models_only() -> None:
    """Asked for on another model, the mode names the layers that have none."""
    model, geometry = measured("llama")
    kernels = load_kernels()
    if not isinstance(kernels, Kernels):
        pytest.skip("the compiled kernels are not installed")

    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1, 2\] store no latent"):
        choose_mode(model, geometry, "latent", kernels)


def test_a_state_that_is_not_resumed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a reused prefix a recurrent layer starts from its saved state, not from the first one."""
    model, geometry = measured("qwen3_next")
    monkeypatch.setattr(StateArena, "copy", lambda *_args: None)

    with pytest.raises(UnsupportedModelError, match="hybrid: "):
        choose_mode(model, geometry, "hybrid")


def test_a_mask_that_lets_queries_look_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk behind a past must not read its own future."""
    model, geometry = measured("llama")

    def see_all(_spec: GroupSpec, span: Span, first: int) -> Tensor:
        return torch.ones(len(span), span.stop - first, dtype=torch.bool)

    monkeypatch.setattr(inputs, "_mask_QS", see_all)

    with pytest.raises(UnsupportedModelError, match=rf"{REFUSED} \(native: error "):
        choose_mode(model, geometry, "native")


def test_reading_what_nobody_wrote_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed blocks hold NaN in the self-test, so a lost write is an infinite error."""
    model, geometry = measured("llama")
    monkeypatch.setattr(GatherAttention, "write", lambda *_args: None)

    with pytest.raises(UnsupportedModelError, match="native: error inf"):
        choose_mode(model, geometry, "native")


def test_a_mode_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its softcap native and gather are wrong; dense uses the model's own attention."""
    model, geometry = measured("gemma2")
    monkeypatch.setattr(hooks, "AttentionTerms", terms_without("softcap"))

    verdict = choose_mode(model, geometry)

    assert verdict.mode is Mode.DENSE
    errors = [trial.error for trial in verdict.trials]
    assert all(error is not None for error in errors)
    assert [(error or 0.0) > verdict.tolerance for error in errors] == [True, True, False]


def test_a_mode_that_cannot_run_is_recorded_with_its_reason() -> None:
    """MLA transforms K/V behind the cache, so native cannot run and the reason is kept."""
    model, geometry = measured("deepseek_v3")

    native, gather = choose_mode(model, geometry).trials

    assert native.error is None
    assert native.failure is not None
    assert gather.failure is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_half_precision_passes_within_its_own_noise(name: str, dtype: torch.dtype) -> None:
    """The tolerance follows the number type, and a wrong window is refused all the same."""
    model = build_tiny(name, dtype=dtype)
    geometry = measure_geometry(model, 8)

    verdict = choose_mode(model, geometry)

    assert verdict.mode is Mode.NATIVE
    assert 1e-3 < verdict.tolerance <= 6e-2
    if any(group.kind is LayerKind.SLIDING for group in geometry.spec.groups):
        with pytest.raises(UnsupportedModelError):
            choose_mode(model, with_window(geometry, -6), "native")


@pytest.fixture(autouse=True)
def _models_are_left_as_they_were() -> Iterator[None]:
    """No self-test, passed or refused, leaves a step behind."""
    yield
    assert hooks._STEP.get() is None
