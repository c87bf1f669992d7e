"""What makes K/V comparable: weights, config and positions; and how long a request may be."""

from typing import Any

import pytest
import torch

from kvkeep.config import SamplingParams
from kvkeep.errors import ConfigError
from kvkeep.hf.fingerprint import longest_context, model_fingerprint, position_regime
from kvkeep.llm import LLM
from kvkeep.testing.oracle import greedy
from kvkeep.testing.tiny_models import build_tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 48,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


def test_equal_models_have_equal_fingerprints() -> None:
    """Built twice, in two objects."""
    assert model_fingerprint(build_tiny("llama")) == model_fingerprint(build_tiny("llama"))


def test_every_change_of_a_model_changes_its_fingerprint() -> None:
    """One weight by the smallest step, a setting, the number type, another seed."""
    touched = build_tiny("llama")
    weight = touched.lm_head.weight
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    models = [
        build_tiny("llama"),
        touched,
        build_tiny("llama", changes={"rms_norm_eps": 1e-3}),
        build_tiny("llama", dtype=torch.bfloat16),
        build_tiny("llama", seed=1),
    ]

    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_the_position_regime_is_the_rope_parameters() -> None:
    """Another base is another regime; a model without RoPE has none."""
    other = build_tiny(
        "llama", changes={"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    )

    assert position_regime(build_tiny("llama")) != position_regime(other)
    assert position_regime(build_tiny("gpt2")) == ""


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3"])
def test_the_context_is_the_models_own_unless_less_is_asked_for(name: str) -> None:
    """Asking for more than positions exist is refused with both numbers; ALiBi has no end."""
    model = build_tiny(name)
    limit = longest_context(model, None)

    assert limit == (2**31 if name == "bloom" else 1024)
    assert longest_context(model, 100) == 100
    if name != "bloom":
        with pytest.raises(ConfigError, match="max_context=2000 is more than 1024"):
            longest_context(model, 2000)


@pytest.mark.parametrize(
    ("name", "changes", "limit"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}, 48),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 64),
    ],
    ids=["longrope", "dynamic"],
)
def test_rope_that_depends_on_the_batch_stays_within_its_first_regime(
    name: str, changes: dict[str, Any], limit: int
) -> None:
    """A short request beside one of the longest allowed gets the tokens it gets alone without a cache."""
    model = build_tiny(name, changes=changes)
    assert longest_context(model, None) == limit
    with pytest.raises(ConfigError, match=f"max_context={limit + 1} is more than {limit}"):
        longest_context(model, limit + 1)
    prompts = [list(range(20, 20 + limit - 6)), list(range(90, 80, -1))]
    llm = LLM(model, block_size=8, capacity="1MB", poison=True)

    outputs = llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0))

    oracle = build_tiny(name, changes=changes)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.token_ids == greedy(oracle, prompt, 6).token_ids
