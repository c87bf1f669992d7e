"""What it costs to compute tokens, and to load blocks: two models, each fitted to this machine online.

    compute   T(a, b) = fixed + linear (b - a) + quadratic (b^2 - a^2) / 2    tokens a <= p < b
    load      T(n)    = latency + (queued + n) / bandwidth                    n bytes

The quadratic part is attention, in which a token at p reads p others. Seconds throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.planning.fitting import LinearFit
from kvkeep.spec import Span

__all__ = ["ComputeCost", "ComputeFit", "LoadCost", "LoadFit"]

# No medium is faster: a bandwidth stays a number that divides and that JSON can write.
_MOST_BYTES_PER_S = 1e13
# Where a guess says nothing of a coefficient, it is assumed to matter at about these sizes.
_TOKENS_OF_FIXED = 8.0
_CONTEXT_OF_QUADRATIC = 16384.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeCost:
    """Seconds of a step, by the positions that it computes; all 0 or more."""

    fixed_s: float
    linear_s: float
    quadratic_s: float

    def seconds(self, spans: Sequence[Span]) -> float:
        """One step that computes these spans; nothing for no tokens."""
        return self.fixed_s + self.marginal_s(spans) if any(map(len, spans)) else 0.0

    def marginal_s(self, spans: Sequence[Span]) -> float:
        """What these spans add to a step that takes place anyway."""
        return self.linear_s * _num_tokens(spans) + self.quadratic_s * _num_pairs(spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadCost:
    """Seconds until bytes of one tier have arrived: `latency_s` 0 or more, `bytes_per_s` positive."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int, queued_bytes: int = 0) -> float:
        """A run of loads behind what is queued already; nothing for no bytes."""
        if not num_bytes:
            return 0.0
        return self.latency_s + (queued_bytes + num_bytes) / self.bytes_per_s


class ComputeFit:
    """Learns the cost of computing from the steps that were run; for one thread."""

    def __init__(self, start: ComputeCost) -> None:
        per_token = max(start.linear_s, start.fixed_s / 1024, 1e-9)
        self._fit = LinearFit(
            (start.fixed_s, start.linear_s, start.quadratic_s),
            (
                max(start.fixed_s, per_token * _TOKENS_OF_FIXED),
                per_token,
                max(start.quadratic_s, per_token / _CONTEXT_OF_QUADRATIC),
            ),
        )

    @property
    def num_observed(self) -> int:
        """Steps that it has learnt from."""
        return self._fit.num_observed

    @property
    def cost(self) -> ComputeCost:
        """The best estimate now."""
        fixed_s, linear_s, quadratic_s = self._fit.coefficients
        return ComputeCost(fixed_s=fixed_s, linear_s=linear_s, quadratic_s=quadratic_s)

    def observe(self, spans: Sequence[Span], seconds: float) -> None:
        """Learn from a step that computed `spans`, of one request or of many."""
        num_tokens, num_pairs = _num_tokens(spans), _num_pairs(spans)
        if num_tokens and seconds > 0:
            context = int(num_pairs / num_tokens)
            size = (num_tokens.bit_length() // 2, context.bit_length() // 3)
            self._fit.observe((1.0, num_tokens, num_pairs), seconds, size)


class LoadFit:
    """Learns the cost of loading from one tier from the loads that have finished; for one thread."""

    def __init__(self, start: LoadCost) -> None:
        per_byte = 1 / start.bytes_per_s
        self._fit = LinearFit(
            (start.latency_s, per_byte), (max(start.latency_s, per_byte * 4096), per_byte)
        )

    @property
    def num_observed(self) -> int:
        """Loads that it has learnt from."""
        return self._fit.num_observed

    @property
    def cost(self) -> LoadCost:
        """The best estimate now."""
        latency_s, per_byte = self._fit.coefficients
        return LoadCost(latency_s=latency_s, bytes_per_s=1 / max(per_byte, 1 / _MOST_BYTES_PER_S))

    def observe(self, num_bytes: int, seconds: float, queued_bytes: int = 0) -> None:
        """Learn from a load of `num_bytes` that came `seconds` after it was asked for.

        `queued_bytes` were asked for before it and had not come.
        """
        total_bytes = num_bytes + queued_bytes
        if num_bytes and seconds > 0:
            self._fit.observe((1.0, total_bytes), seconds, total_bytes.bit_length() // 2)


def _num_tokens(spans: Sequence[Span]) -> int:
    return sum(map(len, spans))


def _num_pairs(spans: Sequence[Span]) -> float:
    """Pairs of a token with one that it reads, up to half a token each."""
    return sum((span.stop - span.start) * (span.stop + span.start) for span in spans) / 2
