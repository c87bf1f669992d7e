"""What a KV format does to a model's own next-token distributions, measured on its weights at load time.

Legend: T tokens of all sequences, V vocabulary, R rows of logits.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvkeep.attention import AttentionBackend
from kvkeep.errors import UnsupportedModelError
from kvkeep.hf.layer_damage import DamageMeter
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.probe_tokens import probe_tokens
from kvkeep.hf.trial_logits import Served, trial_logits
from kvkeep.native import MOST_QUERIES
from kvkeep.spec import KVSpec, with_format

__all__ = [
    "FormatProbe",
    "ProbeBasis",
    "is_quantised",
    "measure_basis",
    "probe_format",
    "served_in",
]

# Nats. Caches of 4 bits that work were measured by others at 0.01 to 0.02; one at 0.055 made every fourth
# most likely token another one.
_LIMIT = 0.05
# What a format can be had for where few layers are delicate: these are kept exact until it is reached.
_NAME_TO_AIM = {"fp8": 0.003, "int8": 0.003, "int4": 0.02}
# A model that rounds as much by itself is not the format's fault.
_NOISE_MARGIN = 2.0
_ROWS_AT_ONCE = 64
# Of first blocks that lie apart, while a format is measured: sequences are short, and what is quantised lies
# behind. Attention sinks are fewer tokens than these.
_FIRST_BLOCK_SIZE = 8

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Between distributions: mean KL divergence in nats, and the share with the same best token."""

    kld: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class ProbeBasis:
    """What formats are compared with: the model's logits with K/V in its own dtype.

    `noise` is what the same differ by when they are computed in other spans.
    """

    sequences: tuple[tuple[int, ...], ...]
    logits_TV: Tensor
    noise: Divergence

    @property
    def limit(self) -> float:
        """The largest mean divergence that is accepted."""
        return max(_LIMIT, _NOISE_MARGIN * self.noise.kld)

    def aim(self, name: str) -> float:
        """The mean divergence up to which no more layers are kept exact."""
        return min(self.limit, max(_NAME_TO_AIM.get(name, _LIMIT), _NOISE_MARGIN * self.noise.kld))


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatProbe:
    """The verdict on one format, against K/V in the model's dtype.

    Layers are kept exact until the divergence is within the `aim`; within the `limit` it will do.

    `kld` is the mean KL divergence of next-token distributions in nats, `top1_agreement` the share of
    positions with the same most likely token; both with `exact_layers` kept in the model's dtype, and
    `whole_kld` and `whole_top1_agreement` without any such layer. The noise is the same for K/V in the
    model's dtype computed in other spans: what is below it means nothing.
    """

    format: str
    kld: float
    top1_agreement: float
    exact_layers: tuple[int, ...]
    whole_kld: float
    whole_top1_agreement: float
    aim: float
    limit: float
    num_positions: int
    noise_kld: float
    noise_top1_agreement: float

    @property
    def passed(self) -> bool:
        """Whether the divergence is within the limit."""
        return self.kld <= self.limit

    def check(self, model_type: str, num_layers: int, dtype: str) -> None:
        """Warn when layers are kept exact; raise UnsupportedModelError when even that does not suffice."""
        whole = (
            f"mean KL divergence {self.whole_kld:.2g} nats, same best token at "
            f"{self.whole_top1_agreement:.0%}"
        )
        numbers = ", ".join(map(str, self.exact_layers))
        kept = f"{len(self.exact_layers)} of {num_layers} layers ({numbers}) in {dtype}"
        found = f"{self.kld:.2g} nats, {self.top1_agreement:.0%}"
        if not self.passed:
            others = "'int8' or 'auto'" if self.format in ("int4", "k8v4") else "'auto'"
            raise UnsupportedModelError(
                f"kv_format={self.format!r} changes what this model ({model_type}) says by too much: "
                f"{whole}, and with {kept} still {found}; the limit is {self.limit:.2g} nats over "
                f"{self.num_positions} positions; use kv_format={others}, or kv_exact_layers=() to have it "
                "all the same"
            )
        if self.exact_layers:
            _LOGGER.warning(
                "kv_format=%r in all layers changes what this model (%s) says more than it should (%s; "
                "the aim is %.2g nats), so it has %s: now %s. kv_exact_layers sets them by hand",
                self.format,
                model_type,
                whole,
                self.aim,
                kept,
                found,
            )


def is_quantised(spec: KVSpec) -> bool:
    """Whether some layer's K/V are codes."""
    return any(
        layer.k.is_quantised or layer.v.is_quantised
        for group in spec.groups
        for layer in group.formats
    )


def served_in(served: Served, name: str, exact_layers: Sequence[int] = ()) -> Served:
    """The same model with its K/V in another format; raises ConfigError as `with_format` does."""
    spec = with_format(served.geometry.spec, name, exact_layers=exact_layers)
    return replace(served, geometry=replace(served.geometry, spec=spec))


def measure_basis(served: Served) -> ProbeBasis:
    """Choose the tokens and compute the model's own logits for them, twice: a few hundred positions."""
    own = served_in(served, "auto")
    sequences = probe_tokens(served.model, is_packed=served.is_packed)
    logits_TV = trial_logits(own, sequences, chunk=_chunk(served, sequences))
    again_TV = trial_logits(own, sequences, chunk=_other_chunk(served, sequences))
    return ProbeBasis(tuple(sequences), logits_TV, divergence(logits_TV, again_TV))


def probe_format(served: Served, name: str, basis: ProbeBasis) -> FormatProbe:
    """Measure a format; when it misses its aim, also with the most damaged layers kept exact.

    One forward over the basis where all is well. Else one that ranks the layers, and one for each number of
    exact layers that is tried: 1, 2, 4, up to half of them. Where none reaches the aim it is the fewest that
    are within the limit. Where first blocks are kept exact, only what lies behind eight such tokens counts.
    """
    served, rows_R = _behind_first_blocks(served, basis)
    whole = _measured(served, name, (), basis, rows_R)
    tried = [_Tried((), whole)]
    if whole.kld > basis.aim(name):
        for candidate in _candidates(_ranking(served, name, basis)):
            found = _measured(served, name, candidate, basis, rows_R)
            tried.append(_Tried(candidate, found))
            if found.kld <= basis.aim(name):
                break
    exact_layers, found = _best(tried, basis, name)
    return FormatProbe(
        format=name,
        kld=found.kld,
        top1_agreement=found.top1_agreement,
        exact_layers=exact_layers,
        whole_kld=whole.kld,
        whole_top1_agreement=whole.top1_agreement,
        aim=basis.aim(name),
        limit=basis.limit,
        num_positions=len(rows_R),
        noise_kld=basis.noise.kld,
        noise_top1_agreement=basis.noise.top1_agreement,
    )


class _Tried(NamedTuple):
    """Layers kept exact, and what is left."""

    exact_layers: tuple[int, ...]
    found: Divergence


def _best(tried: Sequence[_Tried], basis: ProbeBasis, name: str) -> _Tried:
    """The one that reaches the aim, or the first one within the limit, or the last one."""
    if tried[-1].found.kld <= basis.aim(name):
        return tried[-1]
    return next((one for one in tried if one.found.kld <= basis.limit), tried[-1])


def divergence(logits_RV: Tensor, other_RV: Tensor) -> Divergence:
    """How far the distributions of `other_RV` are from those of `logits_RV`, row by row."""
    kld, agreeing = 0.0, 0
    for own, other in zip(
        logits_RV.split(_ROWS_AT_ONCE), other_RV.split(_ROWS_AT_ONCE), strict=True
    ):
        own_log, other_log = own.float().log_softmax(-1), other.float().log_softmax(-1)
        kld += (own_log.exp() * (own_log - other_log)).sum().item()
        agreeing += int((own.argmax(-1) == other.argmax(-1)).sum())
    mean = kld / len(logits_RV)
    # What is not a number is as far away as can be.
    return Divergence(max(mean, 0.0) if mean == mean else float("inf"), agreeing / len(logits_RV))


def _behind_first_blocks(served: Served, basis: ProbeBasis) -> tuple[Served, Tensor]:
    """How a format is measured, and the rows that count: all of them unless first blocks are kept exact."""
    spec, num_exact = served.geometry.spec, 0
    if spec.exact_first_block and spec.block_size % _FIRST_BLOCK_SIZE == 0:
        num_exact = _FIRST_BLOCK_SIZE
        spec = replace(spec, block_size=num_exact)
        served = replace(served, geometry=replace(served.geometry, spec=spec))
    positions = [at for ids in basis.sequences for at in range(len(ids))]
    rows_R = torch.tensor([row for row, at in enumerate(positions) if at >= num_exact])
    return served, rows_R


def _measured(
    served: Served, name: str, exact_layers: Sequence[int], basis: ProbeBasis, rows_R: Tensor
) -> Divergence:
    own = served_in(served, name, exact_layers)
    logits_TV = trial_logits(own, basis.sequences, chunk=_chunk(served, basis.sequences))
    return divergence(basis.logits_TV[rows_R], logits_TV[rows_R])


def _ranking(served: Served, name: str, basis: ProbeBasis) -> list[int]:
    spec = served_in(served, name).geometry.spec
    meters: list[DamageMeter] = []

    def watch(backend: AttentionBackend) -> DamageMeter:
        meters.append(DamageMeter(backend, spec))
        return meters[-1]

    longest = max(map(len, basis.sequences))
    watched = served_in(served, "auto")
    if watched.mode is Mode.LATENT:
        # A meter stands in the way of absorption; what is stored is the same.
        watched = replace(watched, mode=Mode.GATHER)
    trial_logits(watched, basis.sequences, chunk=longest, watch=watch)
    return meters[0].ranking()


def _candidates(ranking: Sequence[int]) -> Iterator[tuple[int, ...]]:
    most, count = len(ranking) // 2, 1
    while count < most:
        yield tuple(sorted(ranking[:count]))
        count *= 2
    if most:
        yield tuple(sorted(ranking[:most]))


def _chunk(served: Served, sequences: Sequence[Sequence[int]]) -> int:
    """Spans short enough for the kernels that read blocks in place, where there is one forward for all."""
    return MOST_QUERIES if served.is_packed else max(map(len, sequences))


def _other_chunk(served: Served, sequences: Sequence[Sequence[int]]) -> int:
    longest = max(map(len, sequences))
    return longest if served.is_packed else max(1, longest // 2)
