"""Heads that the CPU kernels have no room for: torch serves them, and the library refuses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.errors import KernelError
from kvkeep.hf.generate_cache import KeepCache
from kvkeep.hf.memory import kernels_can_serve
from kvkeep.llm import LLM
from kvkeep.native import MOST_DIM, Kernels, KernelsAbsent, load_kernels
from kvkeep.native.refs import terms_ref
from kvkeep.spec import GroupSpec, KVSpec, LayerKind
from kvkeep.testing.oracle import greedy
from kvkeep.testing.tiny_models import build_tiny
from tests.generate_calls import RoundingCache, generate, prompt_of
from tests.unit.test_native_library import small_arena, small_items

OPS = Path(__file__).resolve().parents[2] / "native" / "src" / "ops.h"


@pytest.fixture
def loaded() -> Kernels:
    """The kernels of this installation."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    return found


def test_the_limit_is_that_of_the_library() -> None:
    """One number, in Python and in C++."""
    assert f"constexpr int kMaxDim = {MOST_DIM};" in OPS.read_text(encoding="utf-8")


def test_the_library_refuses_wider_heads(loaded: Kernels) -> None:
    """In Python when the arena is described, and in the library before anything is read."""
    wide_D = torch.ones(MOST_DIM + 8)
    for changes in ({"k_signs_D": wide_D}, {"v_signs_D": wide_D}):
        with pytest.raises(KernelError, match=r"dim=2056.* kernels take at most 2048"):
            small_arena(**changes)
    q_THD = torch.ones(2, 4, 16)
    for field in ("k_dim", "v_dim"):
        arena = small_arena()
        setattr(arena.struct, field, MOST_DIM + 8)
        with pytest.raises(KernelError, match=f"attend: bad_argument: .*{field}=2056"):
            loaded.attend(arena, 0, small_items(), terms_ref(1.0), q_THD, torch.empty_like(q_THD))


def test_kernels_are_not_chosen_for_wider_heads() -> None:
    """On either side of the limit, for keys and for values."""
    widest = GroupSpec(
        name="full", kind=LayerKind.FULL, layers=(0,), itemsize=4,
        k_heads=1, k_dim=MOST_DIM, v_heads=1, v_dim=MOST_DIM,
    )  # fmt: skip
    for group, expected in (
        (widest, True),
        (replace(widest, k_dim=MOST_DIM + 8), False),
        (replace(widest, v_dim=MOST_DIM + 8), False),
    ):
        spec = KVSpec(groups=(group,), block_size=8, dtype="float32")
        assert kernels_can_serve(spec, torch.device("cpu")) is expected


def test_a_model_with_wider_heads_is_served_by_torch() -> None:
    """In the engine and under generate(), quantised or not."""
    changes = {"head_dim": MOST_DIM + 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model, prompt = build_tiny("llama", changes=changes | {"num_hidden_layers": 1}), prompt_of(20)
    llm = LLM(model, settings=EngineSettings(block_size=8, capacity="8MB"))
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

    (output,) = llm.generate([prompt[0].tolist()], params)

    truth = greedy(model, prompt[0].tolist(), 4)
    assert output.token_ids == tuple(truth.token_ids)
    keep = KeepCache(model, "8MB", 8, kv_format="int8", kv_exact_layers=())
    assert keep._memory.kernels is None
    expected = generate(model, prompt, past_key_values=RoundingCache(model, "int8"))
    assert generate(model, prompt, past_key_values=keep) == expected
