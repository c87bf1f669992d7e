"""A KV format is measured on the model's own weights: damaged layers stay exact, or the format is refused."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.errors import ConfigError, UnsupportedModelError
from kvkeep.hf import format_probe
from kvkeep.hf.format_probe import divergence, measure_basis, probe_format, served_in
from kvkeep.hf.geometry import measure_geometry
from kvkeep.hf.install import install
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.probe_tokens import probe_tokens
from kvkeep.hf.trial_logits import Served, trial_logits
from kvkeep.llm import LLM
from kvkeep.native import Kernels, load_kernels
from kvkeep.testing.oracle import greedy, logits_at_all_positions
from kvkeep.testing.tiny_models import build_tiny

BLOCK_SIZE = 8
SEQUENCES = [list(range(10, 61)), list(range(100, 70, -1)), [5]]


def served(name: str, mode: Mode, kernels: Kernels | None = None) -> Served:
    """A tiny model, as it computes K/V."""
    model = build_tiny(name)
    return Served(model, measure_geometry(model, BLOCK_SIZE), mode, kernels)


def kernels_for(mode: Mode) -> Kernels | None:
    """The kernels, if there are any; skips where the mode is nothing without them."""
    found = load_kernels()
    if mode is Mode.LATENT and not isinstance(found, Kernels):
        pytest.skip("the compiled kernels are not installed")
    return found if isinstance(found, Kernels) else None


def biased_model(*layers: int) -> PreTrainedModel:
    """A tiny Qwen2 of four layers, some of which have key biases that dwarf the rest of a key."""
    model = build_tiny("qwen2", changes={"num_hidden_layers": 4})
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.bias.mul_(40.0 if at in layers else 0.1)
        # Queries that see little of it, as in a trained model: scores stay within what softmax resolves.
        layer.self_attn.q_proj.weight.mul_(0.25)
        layer.self_attn.q_proj.bias.mul_(0.0)
    return model


def settings(**options: Any) -> EngineSettings:
    """Small blocks and little memory."""
    chosen: dict[str, Any] = {"block_size": BLOCK_SIZE, "capacity": "2MB"} | options
    return EngineSettings(**chosen)


@pytest.mark.parametrize("chunk", [7, 16, 64])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", Mode.NATIVE),
        ("gemma3", Mode.NATIVE),
        ("deepseek_v3", Mode.LATENT),
        ("deepseek_v3", Mode.GATHER),
        ("lfm2", Mode.HYBRID),
        ("falcon", Mode.DENSE),
    ],
)
def test_logits_behind_every_token_are_the_models_own(name: str, mode: Mode, chunk: int) -> None:
    """In every mode and in any spans, through kernels where there are some."""
    one = served(name, mode, kernels_for(mode))

    logits_TV = trial_logits(one, SEQUENCES, chunk=chunk)

    truth_TV = torch.cat([logits_at_all_positions(one.model, ids) for ids in SEQUENCES])
    assert logits_TV.shape == truth_TV.shape
    assert (logits_TV - truth_TV).abs().max() <= 1e-4 * truth_TV.abs().max()


def test_divergence_is_the_mean_of_all_rows() -> None:
    """Against the textbook sum, over more rows than are computed at once; nonsense is infinitely far."""
    generator = torch.Generator().manual_seed(0)
    own_RV, other_RV = torch.randn(2, 150, 9, generator=generator)
    p_RV, q_RV = own_RV.double().softmax(-1), other_RV.double().softmax(-1)

    found = divergence(own_RV, other_RV)

    assert found.kld == pytest.approx((p_RV * (p_RV / q_RV).log()).sum(-1).mean().item(), rel=1e-5)
    agreeing = (own_RV.argmax(-1) == other_RV.argmax(-1)).float().mean().item()
    assert found.top1_agreement == pytest.approx(agreeing)
    assert divergence(own_RV, own_RV).kld == 0
    assert divergence(own_RV, own_RV * torch.nan).kld == float("inf")


def test_a_healthy_model_keeps_no_layer_exact() -> None:
    """Nothing is refused or warned about, and the numbers are above the noise and below the limit."""
    probe = install(build_tiny("gemma2"), settings(kv_format="int8")).format_probe

    assert probe is not None
    assert probe.format == "int8"
    assert probe.exact_layers == ()
    assert probe.noise_kld < 1e-6 < probe.kld == probe.whole_kld < probe.limit == 0.05
    assert 0.8 < probe.top1_agreement <= 1
    assert probe.num_positions > 300


@contextmanager
def warnings_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """What a logger says, however other tests of this process have configured logging."""
    logger, records = logging.getLogger(name), list[logging.LogRecord]()
    before = logger.level, logger.disabled, logger.manager.disable
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]  # a list is all there is to it
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    logger.setLevel(logging.WARNING)
    logger.disabled = False
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        level, logger.disabled, disabled_level = before
        logger.setLevel(level)
        logging.disable(disabled_level)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(("layer", "exact_layers"), [(0, (0,)), (2, (0, 2))])
def test_the_layer_with_large_key_biases_is_kept_exact(
    layer: int, exact_layers: tuple[int, ...], kernels: str
) -> None:
    """It is found, said in a warning with the numbers, and the rest of the model has the format.

    Layer 2 amplifies what layer 0 does to its queries, so that both must stay.
    """
    chosen = settings(kv_format="int4", kernels=kernels)

    with warnings_of("kvkeep.hf.format_probe") as records:
        installed = install(biased_model(layer), chosen)

    probe = installed.format_probe
    assert probe is not None
    assert layer in probe.exact_layers == exact_layers
    assert probe.kld <= probe.limit < probe.whole_kld
    assert probe.top1_agreement > probe.whole_top1_agreement
    (group,) = installed.geometry.spec.groups
    assert [one.k.is_quantised for one in group.formats] == [
        at not in exact_layers for at in range(4)
    ]
    numbers = ",".join(map(str, exact_layers))
    assert f"{numbers}=float32" in installed.namespace.kv_format
    (record,) = records
    said = record.getMessage()
    assert "kv_format='int4' in all layers changes what this model (qwen2) says more than" in said
    assert f"{probe.whole_kld:.2g} nats" in said
    kept = f"{len(exact_layers)} of 4 layers ({', '.join(map(str, exact_layers))}) in float32"
    assert f"{kept}: now {probe.kld:.2g} nats" in said


def test_what_is_generated_with_exact_layers_is_near_the_models_own() -> None:
    """On tokens that the probe never saw; with every layer in the format it is far off."""
    model, prompt = biased_model(1), list(range(20, 60))
    truth = greedy(model, prompt, 12)
    whole_sequence = [prompt + list(truth.token_ids)]

    def kld_of(exact_layers: tuple[int, ...]) -> float:
        one = Served(model, measure_geometry(model, BLOCK_SIZE), Mode.NATIVE, None)
        own_TV = trial_logits(one, whole_sequence, chunk=16)
        other_TV = trial_logits(served_in(one, "int4", exact_layers), whole_sequence, chunk=16)
        return divergence(own_TV, other_TV).kld

    llm = LLM(model, settings=settings(kv_format="int4"))
    probe = llm.installed.format_probe
    assert probe is not None
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    (output,) = llm.generate([prompt], params)
    first_token_agrees = output.token_ids[0] == truth.token_ids[0]
    assert first_token_agrees or truth.margins[0] < 0.5
    assert kld_of(probe.exact_layers) < 0.05 < kld_of(())


def test_a_format_that_half_of_the_layers_cannot_save_is_refused() -> None:
    """The error names setting, numbers and remedies, and one of them is to have it all the same."""
    model = biased_model(0, 1, 2, 3)

    with pytest.raises(UnsupportedModelError) as caught:
        install(model, settings(kv_format="int4"))

    said = str(caught.value)
    for part in ("kv_format='int4'", "(qwen2)", "nats", "2 of 4 layers", "'int8' or 'auto'"):
        assert part in said
    installed = install(model, settings(kv_format="int4", kv_exact_layers=()))
    assert installed.format_probe is None
    assert installed.namespace.kv_format == "int4/1"


def test_nothing_is_measured_where_nothing_is_to_be_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No quantised format, layers that were asked for, or no self-test: no probe, and no cost."""
    model = biased_model(0, 1, 2, 3)
    monkeypatch.setattr(format_probe, "trial_logits", None)

    for chosen in (
        settings(),
        settings(kv_format="bfloat16"),
        settings(kv_format="int4", self_test=False),
        settings(kv_format="int4", kv_exact_layers=(0, 3)),
    ):
        installed = install(model, chosen)
        assert installed.format_probe is None
    assert installed.namespace.kv_format == "int4/1;0,3=float32"


@pytest.mark.parametrize("value", ["none", [0], (0.5,), (True,), (-1,), 3, None])
def test_exact_layers_are_numbers_or_auto(value: object) -> None:
    """The setting is named with its value, and what it may be."""
    with pytest.raises(ConfigError, match=r"kv_exact_layers=.* 'auto'"):
        EngineSettings(kv_exact_layers=value)  # type: ignore[arg-type]  # that is the point


def test_layers_are_tried_in_doubling_steps_up_to_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven layers 1, 2, 4, then 5, always the most damaged ones first, and in order of the model."""
    ranking = [7, 0, 9, 3, 1, 2, 4, 5, 6, 8, 10]

    assert list(format_probe._candidates(ranking)) == [(7,), (0, 7), (0, 3, 7, 9), (0, 1, 3, 7, 9)]
    assert list(format_probe._candidates([4])) == []


def test_the_probe_is_the_same_every_time() -> None:
    """Blocks are shared by those who keep the same layers exact, so the choice must not vary."""
    model = biased_model(2)
    one = Served(model, measure_geometry(model, BLOCK_SIZE), Mode.NATIVE, None)

    first, second = (probe_format(one, "int4", measure_basis(one)) for _ in range(2))

    assert first == second
    assert probe_tokens(model, is_packed=True) == probe_tokens(model, is_packed=True)


def test_tokens_begin_with_the_models_bos_and_fit_its_context() -> None:
    """Massive activations sit on the first token; a short context makes short sequences."""
    model = build_tiny("llama", changes={"bos_token_id": 7, "max_position_embeddings": 24})

    sequences = probe_tokens(model, is_packed=True)

    assert {ids[0] for ids in sequences} == {7}
    assert max(map(len, sequences)) <= 24
    *_, repeated = sequences
    half = (len(repeated) - 1) // 2
    assert repeated[1 : half + 1] == repeated[half + 1 :]
    assert len(probe_tokens(model, is_packed=False)) < len(sequences)


@pytest.mark.parametrize("layer", range(4))
def test_the_most_damaged_layer_comes_first(layer: int) -> None:
    """Measured in one forward without any quantised K/V, so that one layer's damage is not another's."""
    model = biased_model(layer)
    one = Served(model, measure_geometry(model, BLOCK_SIZE), Mode.NATIVE, None)

    assert format_probe._ranking(one, "int4", measure_basis(one))[0] == layer


def test_an_aim_out_of_reach_costs_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is within the limit as it is stays so where exact layers would not reach the aim."""
    monkeypatch.setitem(format_probe._NAME_TO_AIM, "int4", 0.0)

    probe = install(build_tiny("gemma2"), settings(kv_format="int4")).format_probe

    assert probe is not None
    assert (probe.passed, probe.exact_layers) == (True, ())
    assert probe.aim < probe.kld == probe.whole_kld


def test_layers_stay_exact_until_the_aim_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the format would be within the limit without them."""
    monkeypatch.setitem(format_probe._NAME_TO_AIM, "int4", 0.01)

    probe = install(build_tiny("gemma2"), settings(kv_format="int4")).format_probe

    assert probe is not None
    assert len(probe.exact_layers) == 1
    assert probe.kld <= probe.aim < probe.whole_kld < probe.limit


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gemma3", Mode.NATIVE),
        ("deepseek_v3", Mode.LATENT),
        ("deepseek_v3", Mode.GATHER),
        ("lfm2", Mode.HYBRID),
    ],
)
def test_every_mode_can_rank_its_layers(
    name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers that have the format are ranked, and only they are candidates."""
    one = served(name, mode, kernels_for(mode) if mode is Mode.LATENT else None)
    monkeypatch.setattr(format_probe, "_LIMIT", 0.0)

    basis = measure_basis(one)
    ranking = format_probe._ranking(one, "int4", basis)

    with_kv = [at for group in one.geometry.spec.groups if group.k_heads for at in group.layers]
    assert sorted(ranking) == sorted(with_kv)
    basis = replace(basis, noise=replace(basis.noise, kld=0.0))
    probe = probe_format(one, "int4", basis)
    assert not probe.passed
    assert set(probe.exact_layers) == set(ranking[: len(ranking) // 2])
