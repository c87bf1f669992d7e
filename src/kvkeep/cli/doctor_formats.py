"""What each KV format would mean for one model: bytes, divergence, exact layers, and what fits."""

from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.errors import ConfigError
from kvkeep.hf.format_probe import FormatProbe, measure_basis, probe_format, served_in
from kvkeep.hf.trial_logits import Served
from kvkeep.spec import LONG_FORMAT_NAMES, KVSpec

__all__ = ["FormatRow", "compare_formats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatRow:
    """One format: `probe` and the rest are None where the model's K/V cannot have it, for `reason`.

    `ratio` is how many times less a token takes than in the model's dtype. Sizes count the layers that the
    probe keeps exact. `num_tokens` fit into the capacity, None where it bounds requests and not their length.
    """

    format: str
    bytes_per_token: int | None = None
    ratio: float | None = None
    probe: FormatProbe | None = None
    num_tokens: int | None = None
    reason: str | None = None


def compare_formats(
    served: Served,
    count_tokens: Callable[[KVSpec], int | None],
    say: Callable[[str], None],
) -> tuple[FormatRow, ...]:
    """Measure every format on the model's own weights, as it would be served with `kv_exact_layers` "auto".

    `count_tokens` says how many tokens fit; `say` is told what is being measured.
    """
    say("computing the model's own distributions")
    basis = measure_basis(served)
    dtype_bytes = served_in(served, "auto").geometry.spec.bytes_per_token
    rows = []
    for name in LONG_FORMAT_NAMES:
        if name == "auto":
            continue
        say(f"measuring {name}")
        try:
            probe = probe_format(served, name, basis)
        except ConfigError as error:
            rows.append(FormatRow(format=name, reason=str(error)))
            continue
        spec = served_in(served, name, probe.exact_layers).geometry.spec
        rows.append(
            FormatRow(
                format=name,
                bytes_per_token=spec.bytes_per_token,
                ratio=dtype_bytes / spec.bytes_per_token,
                probe=probe,
                num_tokens=count_tokens(spec),
            )
        )
    return tuple(rows)
