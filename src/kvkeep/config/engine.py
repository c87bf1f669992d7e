"""Settings of an engine: memory, batch and mode."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import inf
from typing import Any, Self

from kvkeep.config.durations import parse_duration
from kvkeep.config.extensions import ExtensionGroup, find_extension
from kvkeep.config.sizes import parse_bytes
from kvkeep.errors import ConfigError
from kvkeep.spec import check_format_name

__all__ = ["EngineSettings"]

_POLICIES = ("lru", "slru", "gdsf", "s3fifo")
# Any will do to see whether a share of memory can be read.
_ANY_TOTAL = 2**40
_KERNELS = ("auto", "torch")
_LOADING = ("measured", "always")
_MODES = ("auto", "native", "latent", "gather", "hybrid", "dense")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How much memory, how many tokens a step, and how the model is run.

    `capacity` is bytes, "2GB" or a share of free memory ("20%"). `max_batch_tokens` bounds the tokens
    of a step and `max_requests` the requests that run at once. `max_context` (tokens of prompt and
    output) defaults to the model's own. `mode` "auto" takes the first that passes the self-test;
    `kv_format` is how K/V are stored, one of kvkeep.spec.FORMAT_NAMES: "auto" as the model computes them,
    "int4" in about a quarter of the bytes of bfloat16. `kv_exact_layers` are layers that stay as the model
    computes them: "auto" measures what a quantised format does to this model and keeps those that it must,
    or refuses the format; numbers of layers, or none, are taken as they are. `kv_exact_first_block` keeps the
    first block of every sequence so, which all later tokens may attend to, in layers that read all positions.
    `kernels` "auto" uses the compiled CPU kernels where they are installed and pass the self-test, "torch"
    never; `poison` fills freed blocks with NaN, for tests. `idle_s` seconds after their last use blocks leave
    the device for the tiers below it, where there are any; None keeps them until their room is needed.
    `loading` "measured" loads from tiers what is quicker loaded than computed on this machine, as steps and
    loads have shown; "always" loads all there is. `calibration_folder` keeps what they have shown, or None.

    `default_ttl` is how long blocks of requests live that do not say so (seconds, "1h", "never"; None: never
    ends), `session_ttl` after how long without use a session ends. What tiers hold counts as expired
    `max_clock_skew_s` early, for clocks of machines that differ. Pins may hold `pin_share` of the device's
    blocks. With context="auto" a prompt that keeps less than `context_share` of what its session's last
    chain has of its own is about something else: see kvkeep.cache.lifetimes.relevance.
    """

    block_size: int = 32
    capacity: int | str = "2GB"
    max_batch_tokens: int = 2048
    max_requests: int = 64
    max_context: int | None = None
    policy: str = "slru"
    mode: str = "auto"
    kv_format: str = "auto"
    kv_exact_layers: tuple[int, ...] | str = "auto"
    kv_exact_first_block: bool = False
    kernels: str = "auto"
    self_test: bool = True
    poison: bool = False
    idle_s: float | None = 60.0
    loading: str = "measured"
    calibration_folder: str | None = "~/.cache/kvkeep/calibration"
    default_ttl: float | str | None = None
    session_ttl: float | str | None = None
    max_clock_skew_s: float = 0.0
    pin_share: float = 0.2
    context_share: float = 0.5

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Settings from names and values; an unknown name is an error that suggests the nearest."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
                raise ConfigError(f"{name}={options[name]!r} is no setting; {hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        for field in ("block_size", "max_batch_tokens", "max_requests", "max_context"):
            value = getattr(self, field)
            if field == "max_context" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field}={value!r} is not a positive integer; give at least 1")
        parse_bytes(self.capacity, total_bytes=_ANY_TOTAL)
        _check_time(self.idle_s)
        self._check_lifetimes()
        if self.policy not in _POLICIES:
            find_extension(ExtensionGroup.POLICIES, str(self.policy), built_in=_POLICIES)
        check_format_name(self.kv_format)
        if self.kv_exact_layers != "auto" and not _are_layers(self.kv_exact_layers):
            raise ConfigError(
                f"kv_exact_layers={self.kv_exact_layers!r} is no tuple of layer numbers; give () for none, "
                "or 'auto'"
            )
        if not isinstance(self.kv_exact_first_block, bool):
            raise ConfigError(
                f"kv_exact_first_block={self.kv_exact_first_block!r} is not a bool; give True or False"
            )
        _check_choice("kernels", self.kernels, _KERNELS)
        _check_choice("loading", self.loading, _LOADING)
        _check_choice("mode", self.mode, _MODES)

    def _check_lifetimes(self) -> None:
        for field in ("default_ttl", "session_ttl"):
            if getattr(self, field) is not None:
                parse_duration(field, getattr(self, field))
        skew = self.max_clock_skew_s
        if not (_is_number(skew) and 0 <= skew < inf):
            raise ConfigError(f"max_clock_skew_s={skew!r} is no time; give seconds, 0 or more")
        for field in ("pin_share", "context_share"):
            _check_share(field, getattr(self, field))


def _check_share(field: str, value: object) -> None:
    if not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
        raise ConfigError(f"{field}={value!r} is no share; give a number from 0 to 1")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field}={value!r} is unknown; choose one of {', '.join(choices)}")


def _check_time(idle_s: float | None) -> None:
    if idle_s is not None and not (_is_number(idle_s) and idle_s >= 0):
        raise ConfigError(
            f"idle_s={idle_s!r} is no time; give seconds, 0 or more, or None to keep blocks"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_layers(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in value
    )
