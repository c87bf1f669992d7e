"""Sizes as people write them: "8GB", "512MiB", "20%"."""

import re

from kvkeep.errors import ConfigError

__all__ = ["format_bytes", "parse_bytes"]

_UNIT_TO_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
# What is larger is a slip of the keyboard, and would overflow further on.
_MOST_AMOUNT = 2.0**62
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*$")


def parse_bytes(value: int | str, *, total_bytes: int, field: str = "capacity") -> int:
    """Bytes meant by `value`: a count, "2GB", "512MiB", or a share "20%" of `total_bytes`.

    Raises ConfigError naming `field` when the value cannot be read or is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f'{field}={value!r} is not a size; write bytes, "2GB", "512MiB" or "20%"')
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.match(value)
        unit = match[2].upper() if match else None
        if match is None or (unit != "%" and unit not in _UNIT_TO_BYTES):
            raise ConfigError(
                f'{field}={value!r} is not a size; write bytes, "2GB", "512MiB" or "20%"'
            )
        assert unit is not None
        amount = float(match[1])
        if unit == "%" and amount > 100:
            raise ConfigError(f"{field}={value!r} is more than all memory; write at most 100%")
        if amount > _MOST_AMOUNT:
            raise ConfigError(f"{field}={value!r:.40} is more than any memory; give fewer digits")
        size = int(amount * (total_bytes / 100 if unit == "%" else _UNIT_TO_BYTES[unit]))
    if size <= 0:
        raise ConfigError(f"{field}={value!r} is not positive; give at least one block's bytes")
    return size


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` for people: three digits and a decimal unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
