"""What the KV formats do to what the bundled model says: held-out text, and questions about long prompts.

The model computes in float32. The reference is the same engine with K/V in bfloat16, in spans of the same
length; "float32" is K/V as the model computes them. Each format is measured in every layer, and as it is
served: with the layers kept exact that the probe at load time chooses. The second model is the first one with
outliers in its keys, put there so that the function stays the same.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import exp
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Finding, Run, Script
from kvkeep.codecs import int4
from kvkeep.hf.format_probe import divergence, measure_basis, probe_format, served_in
from kvkeep.hf.geometry import measure_geometry
from kvkeep.hf.load import BUNDLED, load_model
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.trial_logits import Served, trial_logits
from kvkeep.native import Kernels, load_kernels
from models.tiny import evaluate
from models.tiny.batches import Library
from models.tiny.corpus import read_modules
from models.tiny.probes import PROBES

REFERENCE = "bfloat16"
# Most growth of perplexity in %, and most mean divergence in nats.
TARGETS = {"fp8": (0.3, 0.005), "int8": (0.15, 0.002), "int4": (1.0, 0.02), "k8v4": (None, None)}
MOST_POINTS_LOST = 1.0
# By how much some channel pairs of keys grow, and queries shrink: the two that RoPE turns together.
OUTLIERS = {3: 8.0, 9: 12.0, 17: 20.0, 25: 30.0}
# What a prompt is cut into, and what the floor of noise is computed in.
CHUNK, OTHER_CHUNK = 256, 16
QUESTIONS = ("key-value", "needle")
NUM_RESAMPLES = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Up to `texts` pieces of library code, and `questions` of each kind; the budget may leave some out."""

    texts: int
    text_tokens: int
    questions: int
    prompt_tokens: int
    has_targets: bool


@dataclass(slots=True)
class Side:
    """One way of storing K/V, and what was found on each text."""

    name: str
    served: Served
    format: str | None = None  # whose targets it has
    chunk: int = CHUNK
    is_rotated: bool = True
    klds: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    nll_differences: list[float] = field(default_factory=list)
    num_right: int = 0

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits behind every token."""
        with nullcontext() if self.is_rotated else _without_rotation():
            return trial_logits(self.served, [ids], chunk=self.chunk)


@contextmanager
def _without_rotation() -> Iterator[None]:
    with (
        patch.object(int4, "rotate", lambda x_RD: x_RD),
        patch.object(int4, "rotate_back", lambda y_RD: y_RD),
    ):
        yield


def measure(run: Run, settings: Settings) -> None:
    """Both models in turn, with a half of the budget each."""
    library = Library(read_modules(held_out=True), evaluate.load_tokenizer(evaluate.BUNDLED))
    model = load_model(BUNDLED, dtype=torch.float32).model
    kernels = load_kernels()
    way = "by the compiled kernels" if isinstance(kernels, Kernels) else "by torch"
    run.notes.append(
        f"the model computes in float32, attention {way}; all differences are from {REFERENCE} K/V in the "
        f"same engine and the same spans of {CHUNK} tokens; exact layers are in float32"
    )
    run.notes.append(
        "means over all positions; their spread is the 10th to the 90th percentile over resampled texts; "
        "'with 0 exact' is with layer 0 in float32, as the probe at load time chooses: so it is served"
    )
    plain = Served(
        model,
        measure_geometry(model, 32),
        Mode.NATIVE,
        kernels if isinstance(kernels, Kernels) else None,
    )
    _measure_model(run, settings, library, plain, "tiny")
    other = load_model(BUNDLED, dtype=torch.float32).model
    _inject_outliers(other)
    _check_function(run, library, model, other)
    _measure_model(run, settings, library, replace(plain, model=other), "outliers")


@torch.no_grad()
def _inject_outliers(model: PreTrainedModel) -> None:
    """Keys grow and queries shrink by the same factors, after they are normalised and before RoPE."""
    half = model.config.head_dim // 2
    for layer in model.model.layers:
        for channel, factor in OUTLIERS.items():
            for at in (channel, channel + half):
                layer.self_attn.k_norm.weight[at] *= factor
                layer.self_attn.q_norm.weight[at] /= factor


def _check_function(
    run: Run, library: Library, model: PreTrainedModel, other: PreTrainedModel
) -> None:
    ids_1T = torch.tensor([library.code(random.Random(run.seed), 256)[:256]])
    with torch.inference_mode():
        own, changed = (one(ids_1T, use_cache=False).logits[0] for one in (model, other))
    kld = divergence(own, changed).kld
    run.check(
        "in float32, without any cache, outliers in the keys change what the model says by",
        holds=kld < 1e-5,
        found=f"{kld:.1g} nats",
    )


def _measure_model(
    run: Run, settings: Settings, library: Library, served: Served, name: str
) -> None:
    start = perf_counter()
    own = served_in(served, REFERENCE)
    reference = Side(REFERENCE, own)
    by_torch = served_in(replace(served, kernels=None), "int4")
    as_served = list(_as_served(run, served, name))
    sides = [
        Side(f"{REFERENCE} in spans of {OTHER_CHUNK}", own, chunk=OTHER_CHUNK),
        Side("float32", served),
        *as_served,
        *_in_every_layer(served, as_served),
        Side("int4, not rotated", by_torch, is_rotated=False),
    ]
    rng = random.Random(run.seed)
    for number in range(settings.texts):
        _compare(reference, sides, library.code(rng, settings.text_tokens)[: settings.text_tokens])
        if number >= 3 and perf_counter() - start > run.budget_s / 5:
            break
    asked = [reference, *as_served]
    num_asked = _ask(run, settings, library, asked, start + run.budget_s / 2)
    _report(run, settings, name, sides)
    _report_questions(run, settings, name, asked, num_asked)


def _as_served(run: Run, served: Served, name: str) -> Iterator[Side]:
    """Each format with the layers kept exact that the probe chooses, if it does not refuse."""
    basis = measure_basis(served)
    for one in TARGETS:
        probe = probe_format(served, one, basis)
        layers = " and ".join(map(str, probe.exact_layers))
        own = served_in(served, one, probe.exact_layers)
        note = f"{name}: the probe finds a KLD of {probe.whole_kld:.3g} for {one}"
        if layers:
            note += f", {probe.kld:.3g} with {layers} exact"
        note += f"; {own.geometry.spec.bytes_per_token} bytes a token"
        run.notes.append(note if probe.passed else f"{note}: refused")
        if probe.passed:
            yield Side(f"{one} with {layers} exact" if layers else one, own, one)


def _in_every_layer(served: Served, as_served: Sequence[Side]) -> Iterator[Side]:
    """The formats that are not served so."""
    for one in TARGETS:
        if all(side.name != one for side in as_served):
            yield Side(one, served_in(served, one), one)


def _compare(reference: Side, sides: Sequence[Side], ids: Sequence[int]) -> None:
    """One text, by the reference and by all sides."""
    own_TV = reference.logits(ids)
    own_nll = _nll(own_TV, ids)
    for side in sides:
        logits_TV = side.logits(ids)
        found = divergence(own_TV, logits_TV)
        side.klds.append(found.kld)
        side.agreements.append(found.top1_agreement)
        side.nll_differences.append(_nll(logits_TV, ids) - own_nll)


def _nll(logits_TV: Tensor, ids: Sequence[int]) -> float:
    """Nats a token."""
    wanted = torch.tensor(ids[1:])
    return torch.nn.functional.cross_entropy(logits_TV[:-1].float(), wanted).item()


def _ask(
    run: Run, settings: Settings, library: Library, sides: Sequence[Side], deadline_s: float
) -> int:
    """The same questions to all sides; returns how many."""
    tokenizer = evaluate.load_tokenizer(evaluate.BUNDLED)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    rng, num_asked = random.Random(run.seed), 0
    for _ in range(settings.questions):
        for kind in QUESTIONS:
            probe = PROBES[kind](
                rng, settings.prompt_tokens, lambda text: len(ids_of(text)), library
            )
            answer = ids_of(probe.answer)
            for side in sides:
                logits_TV = side.logits(ids_of(probe.prompt) + answer[:-1])
                side.num_right += logits_TV[-len(answer) :].argmax(-1).tolist() == answer
            num_asked += 1
        if perf_counter() > deadline_s:
            break
    return num_asked


def _report(run: Run, settings: Settings, name: str, sides: Sequence[Side]) -> None:
    for side in sides:
        most_growth, most_kld = TARGETS.get(side.format or "", (None, None))
        what = f"{name}, {side.name}"
        if not settings.has_targets:
            most_growth = most_kld = None
        growths = [_growth(sample) for sample in _resampled(run.seed, side.nll_differences)]
        whole = _growth(side.nll_differences)
        _add(run, f"{what}: perplexity", whole, growths, len(side.klds), "%", most_growth)
        klds = [_mean(sample) for sample in _resampled(run.seed, side.klds)]
        _add(run, f"{what}: KLD", _mean(side.klds), klds, len(side.klds), "nats", most_kld)
        shares = [100 * _mean(sample) for sample in _resampled(run.seed, side.agreements)]
        same = 100 * _mean(side.agreements)
        _add(run, f"{what}: same best token", same, shares, len(side.klds), "%", None)


def _report_questions(
    run: Run, settings: Settings, name: str, sides: Sequence[Side], num_asked: int
) -> None:
    reference, *others = sides
    asked = f"of {num_asked} questions of {settings.prompt_tokens} tokens"
    run.add(f"{name}, {REFERENCE}: right {asked}", [reference.num_right], "answers")
    for side in others:
        run.add(
            f"{name}, {side.name}: fewer right {asked}",
            [100 * (reference.num_right - side.num_right) / num_asked],
            "points",
            at_most=MOST_POINTS_LOST if settings.has_targets else None,
        )


def _add(
    run: Run,
    what: str,
    value: float,
    samples: Sequence[float],
    count: int,
    unit: str,
    most: float | None,
) -> None:
    low, high = torch.tensor(samples).quantile(torch.tensor([0.1, 0.9])).tolist()
    run.findings.append(
        Finding(
            what=what,
            unit=unit,
            median=value,
            low=min(low, value),
            high=max(high, value),
            count=count,
            target=None if most is None else f"<= {most:g}",
            holds=None if most is None else value <= most,
        )
    )


def _growth(nll_differences: Sequence[float]) -> float:
    """By how many percent perplexity is larger."""
    return 100 * (exp(_mean(nll_differences)) - 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _resampled(seed: int, values: Sequence[float]) -> list[list[float]]:
    rng = random.Random(seed)
    return [rng.choices(values, k=len(values)) for _ in range(NUM_RESAMPLES)]


main = Script(
    name="format_quality",
    claim="K/V in 8 bits change what the bundled model says by little, in 4 bits by more, outliers or not.",
    full=Settings(texts=24, text_tokens=1024, questions=50, prompt_tokens=2048, has_targets=True),
    quick=Settings(texts=1, text_tokens=48, questions=1, prompt_tokens=160, has_targets=False),
    measure=measure,
)

if __name__ == "__main__":
    main()
