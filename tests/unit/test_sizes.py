"""Sizes as people write them."""

import pytest

from kvkeep.config.sizes import format_bytes, parse_bytes
from kvkeep.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (4096, 4096),
        ("4096", 4096),
        ("100B", 100),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        (" 1.5kb ", 1500),
        ("512MiB", 512 * 2**20),
        ("0.5GiB", 2**29),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("20%", 200_000),
        ("0.1%", 1000),
        ("100%", 1_000_000),
    ],
)
def test_sizes_are_read_as_written(value: int | str, expected: int) -> None:
    """Counts, decimal and binary units, and shares of what there is."""
    assert parse_bytes(value, total_bytes=1_000_000) == expected


@pytest.mark.parametrize(
    "value",
    ["", "GB", "two", "2 XB", "2GB3", "-1GB", "1e9", "20 % of it", "nan", "inf", "1,5GB", "0x10"],
)
def test_what_is_no_size_is_refused(value: str) -> None:
    """The message names the field, the value and how to write one."""
    with pytest.raises(ConfigError, match=r"capacity=.*is not a size; write bytes"):
        parse_bytes(value, total_bytes=1_000_000)


@pytest.mark.parametrize("value", [True, False, None, 1.5, b"2GB", [2]])
def test_other_types_are_refused(value: object) -> None:
    """A size is a whole number or text."""
    with pytest.raises(ConfigError, match=r"room=.*is not a size"):
        parse_bytes(value, total_bytes=1, field="room")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -5, "0", "0GB", "0.1B", "0%"])
def test_nothing_is_not_a_size(value: int | str) -> None:
    """Less than a byte is refused."""
    with pytest.raises(ConfigError, match="is not positive"):
        parse_bytes(value, total_bytes=1_000_000)


@pytest.mark.parametrize("value", ["101%", "100.5%"])
def test_more_than_everything_is_refused(value: str) -> None:
    """A share is at most the whole."""
    with pytest.raises(ConfigError, match="more than all memory"):
        parse_bytes(value, total_bytes=1_000_000)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2e9, "2 GB"), (3.25e12, "3.25 TB")],
)
def test_sizes_are_written_for_people(num_bytes: float, expected: str) -> None:
    """Three digits and a decimal unit."""
    assert format_bytes(num_bytes) == expected


def test_a_size_of_hundreds_of_digits_is_refused() -> None:
    """What would overflow a float is a ConfigError like any other slip."""
    with pytest.raises(ConfigError, match=r"capacity='9+\.*.*is more than any memory"):
        parse_bytes("9" * 400 + "GB", total_bytes=1)
