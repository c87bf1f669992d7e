"""How tokens are chosen: what a request says, what the model's makers advise, what cannot be followed."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvkeep.config import SamplingParams
from kvkeep.errors import ConfigError, RequestError
from kvkeep.server.sampling_fields import (
    SamplingDefaults,
    SamplingRequest,
    refuse_unsupported,
    sampling_params,
)


def _params(body: dict[str, Any], defaults: SamplingDefaults | None = None) -> SamplingParams:
    request = SamplingRequest.model_validate(body)
    return sampling_params(request, defaults or SamplingDefaults(), max_tokens=5, vocab_size=100)


def test_what_a_checkpoint_advises_holds_for_what_is_left_out() -> None:
    """Numbers of its generation_config; fields that it does not set stay those of the protocol."""
    config = SimpleNamespace(do_sample=True, temperature=0.6, top_k=20, top_p=None, min_p=None)

    defaults = SamplingDefaults.of(config)
    params = _params({"top_k": -1, "seed": 3}, defaults)

    assert defaults == SamplingDefaults(temperature=0.6, top_k=20)
    assert params == SamplingParams(max_tokens=5, temperature=0.6, top_k=0, seed=3)


def test_a_greedy_checkpoint_stays_greedy_until_a_temperature_is_asked_for() -> None:
    """do_sample false is advice too."""
    defaults = SamplingDefaults.of(SimpleNamespace(do_sample=False, temperature=0.6))

    assert _params({}, defaults).is_greedy
    assert _params({"temperature": 0.9}, defaults).temperature == 0.9
    assert SamplingDefaults.of(object()) == SamplingDefaults()


def test_every_field_arrives_under_its_own_name() -> None:
    """One request with all of them."""
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"5": -2},
        "seed": 1,
        "n": 2,
        "stop": ["x"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
    }

    assert _params(body) == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={5: -2.0},
        seed=1,
        n=2,
        stop=["x"],
        stop_token_ids=[9],
        include_stop=True,
        ignore_eos=True,
        min_tokens=2,
        skip_special_tokens=False,
    )


@pytest.mark.parametrize(
    "body",
    [
        {"top_k": -2},
        {"stop": ["x"] * 65},
        {"logit_bias": {"100": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"٣": 1}},
        {"logit_bias": {"1" * 5000: 1}},
        {"logit_bias": {"1": float("nan")}},
    ],
)
def test_what_no_sampler_can_do_is_refused(body: dict[str, Any]) -> None:
    """Before anything is computed."""
    with pytest.raises((ConfigError, RequestError)):
        _params(body)


def test_fields_that_ask_for_nothing_are_not_refused() -> None:
    """Clients send neutral values of what they do not use."""
    refuse_unsupported({"best_of": 1, "typical_p": 1, "functions": [], "suffix": None, "x": 1})
    refuse_unsupported(None)

    with pytest.raises(RequestError, match=r"^best_of=5 is not supported"):
        refuse_unsupported({"best_of": 5})
