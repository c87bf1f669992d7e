"""What a request may ask of sampling."""

import dataclasses
import math
import subprocess
import sys

import pytest

from kvkeep.config.sampling import SamplingParams
from kvkeep.errors import ConfigError


def test_defaults_are_plain_sampling() -> None:
    """Without settings, the model's own distribution is sampled, for 16 tokens."""
    params = SamplingParams()

    assert params.max_tokens == 16
    assert not params.is_greedy
    assert not params.needs_history
    assert params.stop_strings == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", False),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", 2),
        ("min_p", -math.inf),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 10**400),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", True),
        ("seed", 1.0),
        ("seed", False),
        ("stop", b"bytes"),
        ("stop", 7),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 3]),
        ("stop", {"a"}),
        ("stop_token_ids", 7),
        ("stop_token_ids", "7"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.0]),
        ("include_stop", 1),
        ("ignore_eos", "yes"),
        ("skip_special_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("n", 0),
        ("n", True),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_remedy(field: str, value: object) -> None:
    """The message names the field, shows the value and says what to give instead."""
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]

    assert str(caught.value).startswith(f"{field}={value!r}")
    assert "give" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 16),
        ("temperature", 0),
        ("temperature", 1e-30),
        ("temperature", 1000),
        ("top_k", 10**9),
        ("top_p", 0),
        ("top_p", 1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("presence_penalty", -2),
        ("seed", -5),
        ("seed", 2**70),
        ("stop", ["a", "b"]),
        ("stop_token_ids", (0, 5)),
        ("logprobs", 0),
        ("logprobs", 20),
    ],
)
def test_the_ends_of_a_range_are_accepted(field: str, value: object) -> None:
    """Ranges include their ends, and whole numbers are numbers."""
    assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((), ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_stop_is_one_text_or_several(stop: str | list[str], expected: tuple[str, ...]) -> None:
    """A lone string is one stop text, not a sequence of characters."""
    assert SamplingParams(stop=stop).stop_strings == expected


def test_greedy_means_that_nothing_is_random() -> None:
    """Temperature 0 and top_k 1 both leave one choice."""
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(top_k=1).is_greedy
    assert not SamplingParams(temperature=0.01, top_k=2).is_greedy


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_needs_the_history(field: str) -> None:
    """The tokens before are needed as soon as one penalty is on."""
    assert SamplingParams(**{field: 1.5}).needs_history  # type: ignore[arg-type]


def test_settings_do_not_change() -> None:
    """A validated object stays valid."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = -1  # type: ignore[misc]


def test_a_wrong_value_is_also_a_value_error() -> None:
    """Callers that know nothing of kvkeep catch ValueError."""
    with pytest.raises(ValueError, match="top_k=-3"):
        SamplingParams(top_k=-3)


def test_settings_load_no_torch() -> None:
    """Reading settings costs no tensor library."""
    program = "import sys, kvkeep.config.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
