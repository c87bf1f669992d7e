"""Does a mode serve this model right? Paged logits against the model's own, on its own weights.

The test computes a random sequence in several ways at once: in chunks, beside another request, with a block
dropped and repaired, and token by token. The floor of noise is what the model's own cache differs from no
cache at all; a mode passes within a small multiple of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvkeep.arena import fit_blocks
from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache import KVCache, Lease
from kvkeep.errors import UnsupportedModelError
from kvkeep.hf.geometry import ModelGeometry, text_config
from kvkeep.hf.latent_cache import has_latents
from kvkeep.hf.memory import READS_PAGES, allocate_memory, kernels_can_serve
from kvkeep.hf.paged_model import Mode, PagedModel, Work
from kvkeep.native import Kernels
from kvkeep.planning import cut_spans
from kvkeep.spec import KVSpec

__all__ = ["ModeTrial", "SelfTest", "choose_mode"]

_NUM_DECODED = 4
# Small blocks put every kind of boundary into few tokens, so that a large model is tested in seconds.
_MOST_BLOCK_SIZE = 8
# Of the logits' largest magnitude: below this a difference is rounding, whatever the noise measured.
_LEAST_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_MOST_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_NOISE_MARGIN = 4.0


@dataclass(frozen=True, slots=True)
class ModeTrial:
    """A mode that was tried: its error relative to the largest logit, or why it could not run.

    `with_kernels` tells the trial of the compiled CPU kernels from that of torch.
    """

    mode: Mode
    error: float | None
    failure: str | None = None
    with_kernels: bool = False

    @property
    def name(self) -> str:
        """The mode, and whether by kernels."""
        return f"{self.mode} with kernels" if self.with_kernels else str(self.mode)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The verdict: the mode chosen, and every trial with its error; errors are relative."""

    mode: Mode
    with_kernels: bool
    tolerance: float
    num_tokens: int
    trials: tuple[ModeTrial, ...]


@dataclass(frozen=True, slots=True)
class _Truth:
    """Tokens, and the model's own logits at the positions compared."""

    ids: list[int]
    logits_RV: Tensor
    tolerance: float


def choose_mode(
    model: PreTrainedModel,
    geometry: ModelGeometry,
    asked: str = "auto",
    kernels: Kernels | None = None,
) -> SelfTest:
    """The first mode whose paged logits equal the model's own; raises UnsupportedModelError with numbers.

    A mode that reads pages is tried with `kernels` first, where there are some and they can hold the model.
    """
    block_size = min(geometry.spec.block_size, _MOST_BLOCK_SIZE)
    geometry = replace(geometry, spec=replace(geometry.spec, block_size=block_size))
    truth = _truth(model, geometry.spec)
    trials: list[ModeTrial] = []
    device = next(model.parameters()).device
    if kernels is not None and not kernels_can_serve(geometry.spec, device):
        kernels = None
    candidates = _candidates(model, geometry, kernels)
    for mode in candidates if asked == "auto" else [Mode(asked)]:
        for own in (kernels, None) if kernels is not None and mode in READS_PAGES else (None,):
            trial = _try(model, geometry, mode, truth, own)
            trials.append(trial)
            if trial.error is not None and trial.error <= truth.tolerance:
                return SelfTest(
                    mode, own is not None, truth.tolerance, len(truth.ids), tuple(trials)
                )
    tried = "; ".join(
        f"{trial.name}: {trial.failure or f'error {trial.error:.2g}'}" for trial in trials
    )
    raise UnsupportedModelError(
        f"model_type={text_config(model).model_type!r} cannot be served right: paged logits differ from "
        f"the model's own by more than {truth.tolerance:.2g} of the largest ({tried}); use "
        "transformers' own cache for it"
    )


def _candidates(
    model: PreTrainedModel, geometry: ModelGeometry, kernels: Kernels | None
) -> list[Mode]:
    if geometry.recurrent_layers:
        return [Mode.HYBRID, Mode.DENSE]
    if kernels is not None and has_latents(model, geometry):
        return [Mode.LATENT, Mode.GATHER, Mode.DENSE]
    return [Mode.NATIVE, Mode.GATHER, Mode.DENSE]


def _truth(model: PreTrainedModel, spec: KVSpec) -> _Truth:
    size, config = spec.block_size, text_config(model)
    longest = min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
    num_tokens = min(3 * size + size // 2 + 1, longest - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator).tolist()
    device = next(model.parameters()).device
    rows = slice(num_tokens - _NUM_DECODED - 1, num_tokens)
    with torch.inference_mode():
        ids_1T = torch.tensor([ids], device=device)
        plain_RV = model(input_ids=ids_1T, use_cache=False).logits[0, rows].float()
        cached_RV = _own_cache_logits(model, ids_1T)[rows].float()
    scale = plain_RV.abs().max().item()
    noise = (plain_RV - cached_RV).abs().max().item() / scale
    dtype = next(model.parameters()).dtype
    least, most = _LEAST_TOLERANCE.get(dtype, 2e-5), _MOST_TOLERANCE.get(dtype, 1e-4)
    return _Truth(ids, plain_RV, min(most, max(least, _NOISE_MARGIN * noise)))


def _own_cache_logits(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    """Logits at every position, one token a step: what rounds least like a single pass."""
    cache = DynamicCache(config=text_config(model))
    out = []
    for at in range(ids_1T.shape[1]):
        step = model(input_ids=ids_1T[:, at : at + 1], past_key_values=cache, use_cache=True)
        out.append(step.logits[0, -1:])
    return torch.cat(out)


def _try(
    model: PreTrainedModel,
    geometry: ModelGeometry,
    mode: Mode,
    truth: _Truth,
    kernels: Kernels | None,
) -> ModeTrial:
    with_kernels = kernels is not None
    try:
        logits_RV = _paged_logits(model, geometry, mode, truth.ids, kernels)
    except Exception as error:  # noqa: BLE001  a model may fail in any way; the trial records it
        failure = f"{type(error).__name__}: {error}"[:200]
        return ModeTrial(mode, None, failure, with_kernels=with_kernels)
    difference = (logits_RV.float() - truth.logits_RV).abs().max() / truth.logits_RV.abs().max()
    error_found = difference.nan_to_num(float("inf")).item()
    return ModeTrial(mode, error_found, with_kernels=with_kernels)


def _paged_logits(
    model: PreTrainedModel,
    geometry: ModelGeometry,
    mode: Mode,
    ids: Sequence[int],
    kernels: Kernels | None,
) -> Tensor:
    """Logits behind the last prompt token and behind each decoded one, after every detour."""
    spec = geometry.spec
    parameter = next(model.parameters())
    num_bytes = spec.block_bytes() * (4 * spec.num_blocks(len(ids)) + 8)
    num_blocks = fit_blocks(spec, num_bytes, max_requests=4, max_batch_tokens=len(ids))
    memory = allocate_memory(
        spec,
        num_blocks,
        mode=mode,
        dtype=parameter.dtype,
        device=parameter.device,
        kernels=kernels,
        poison=True,
    )
    cache = KVCache(spec, num_blocks, memory.arenas)
    paged = PagedModel(model, geometry, memory.arenas, memory.backend, mode)
    root = Namespace(model="self-test", positions="", kv_format="", block_size=spec.block_size)
    num_prompt = len(ids) - _NUM_DECODED
    chunk = spec.block_size + spec.block_size // 2
    with _lease(cache, root, ids[:num_prompt]) as first, _lease(cache, root, ids[::-1]) as other:
        _run(cache, paged, [first, other], chunk)
    prompt = TokenChain(root.root_key(), spec.block_size, ids[:num_prompt])
    cache.drop(prompt, [0, 2] if len(prompt.keys) > 2 else [0])
    with _lease(cache, root, ids[:num_prompt]) as lease:
        rows = [_run(cache, paged, [lease], chunk)]
        for token in ids[num_prompt:]:
            lease.append([token])
            rows.append(_run(cache, paged, [lease], chunk))
    return torch.cat(rows)


def _lease(cache: KVCache, namespace: Namespace, ids: Sequence[int]) -> Lease:
    lease = cache.reserve(TokenChain(namespace.root_key(), namespace.block_size, ids))
    assert lease is not None
    return lease


def _run(cache: KVCache, paged: PagedModel, leases: Sequence[Lease], chunk: int) -> Tensor:
    """Compute all gaps of the leases, `chunk` tokens of each a step; the first one's last logits."""
    last = torch.empty(0)
    while any(lease.gaps for lease in leases):
        work = []
        for lease in leases:
            spans = cut_spans(cache.spec, lease.gaps, len(lease.chain), chunk)
            if spans:
                has_room = cache.extend(lease, spans)
                assert has_room
                # As in an engine: a step that does not reach the last token asks for no logits.
                is_last = spans[-1].stop == len(lease.chain)
                work.append(Work(lease, spans, wants_logits=is_last and lease is leases[0]))
        logits_RV = paged.forward(work)
        if work[0].lease is leases[0]:
            last = logits_RV[:1]
        for item in work:
            cache.commit(item.lease, item.spans)
    return last
