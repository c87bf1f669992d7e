"""What a request asks of the cache, and how lengths of time are written."""

from math import inf

import pytest

from kvkeep.config import CacheOptions, EngineSettings, TagSpan, parse_duration
from kvkeep.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90.0),
        (0, 0.0),
        ("0", 0.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("90s", 90.0),
        ("500ms", 0.5),
        (" 30 m ", 1800.0),
        ("1h", 3600.0),
        ("7d", 604800.0),
        ("1.5H", 5400.0),
        ("never", inf),
        ("NEVER", inf),
        (inf, inf),
    ],
)
def test_durations_are_seconds(value: object, seconds: float) -> None:
    """Numbers are seconds; text has a unit, or none for seconds."""
    assert parse_duration("ttl", value) == seconds


@pytest.mark.parametrize(
    "value", [-1, "-1", "", "h", "1 year", "1h30m", True, None, float("nan"), b"1h", "٣s", "1e3"]
)
def test_what_is_no_duration_is_refused_with_its_field(value: object) -> None:
    """The message begins with the field and says what to write."""
    with pytest.raises(ConfigError, match=r"^ttl=.*never"):
        parse_duration("ttl", value)


def test_a_number_beyond_all_clocks_is_refused() -> None:
    """An integer that no float holds is an error of settings, not of arithmetic."""
    with pytest.raises(ConfigError, match="too long"):
        parse_duration("ttl", 10**400)


def test_tags_become_spans() -> None:
    """Text covers the whole request; the ttl of the settings is None."""
    options = CacheOptions(tags=["a", TagSpan(tag="b", start=40)])

    assert options.tag_spans == (TagSpan(tag="a", start=0), TagSpan(tag="b", start=40))
    assert options.ttl_s is None
    assert CacheOptions(ttl="never").ttl_s == inf


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"session": ""}, "session"),
        ({"session": 7}, "session"),
        ({"session": "x" * 513}, "session"),
        ({"session": "\ud800"}, "session"),
        ({"session": "a\nb"}, "session"),
        ({"tags": ["a\x85b"]}, "tags"),
        ({"pin": "a\x00b"}, "pin"),
        ({"context": "a"}, "context"),
        ({"tags": "doc:77"}, "tags"),
        ({"tags": [""]}, "tags"),
        ({"tags": [7]}, "tags"),
        ({"tags": ["a"] * 65}, "tags"),
        ({"tags": 3}, "tags"),
        ({"ttl": "soon"}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl_counts_from": "last"}, "ttl_counts_from"),
        ({"priority": 101}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": True}, "priority"),
        ({"pin": 1}, "pin"),
        ({"read": None}, "read"),
        ({"exact": "yes"}, "exact"),
        ({"salt": b"x"}, "salt"),
    ],
)
def test_options_that_cannot_be_name_their_field(options: dict[str, object], field: str) -> None:
    """Every message begins with the field that is wrong."""
    with pytest.raises(ConfigError, match=f"^{field}"):
        CacheOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [-1, 1.0, True, "0"])
def test_a_tag_starts_at_a_token(start: object) -> None:
    """Positions are integers from 0 on."""
    with pytest.raises(ConfigError, match=r"^start"):
        TagSpan(tag="a", start=start)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"default_ttl": "x"}, "default_ttl"),
        ({"session_ttl": -3}, "session_ttl"),
        ({"max_clock_skew_s": -1}, "max_clock_skew_s"),
        ({"max_clock_skew_s": inf}, "max_clock_skew_s"),
        ({"pin_share": 1.5}, "pin_share"),
        ({"context_share": "half"}, "context_share"),
    ],
)
def test_settings_of_lifetimes_are_checked(settings: dict[str, object], field: str) -> None:
    """What an engine is told of lifetimes is refused when it is made."""
    with pytest.raises(ConfigError, match=f"^{field}"):
        EngineSettings(**settings)  # type: ignore[arg-type]
