"""Attention by the kernels over MLA latents against attention in fp64 over the same stored values."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvkeep.arena import Slots
from kvkeep.native import Kernels
from kvkeep.spec import GroupSpec, LayerKind
from tests.attention_steps import Case, Length, Step, cases
from tests.properties.test_native_attention import (
    EXACT,
    NUM_EXAMPLES,
    PAIRS,
    QUANTISED,
    ROUNDED,
    kernels,  # noqa: F401  a fixture
    tolerance,
)


class LatentStep(Step):
    """Keys are latents and then rotated dims, values are the latents."""

    function = "attend_latent"

    @staticmethod
    def dims(spec: GroupSpec) -> tuple[int, int]:
        """Of a query, and of a result."""
        return spec.k_dim + spec.v_dim, spec.k_dim

    def stored(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """What lies in the arena as keys is read as both."""
        latents_SKD, rotated_SKD = super().stored(slots)
        return torch.cat([latents_SKD, rotated_SKD], dim=2), latents_SKD


def of_latents(case: Case) -> Case:
    """The case with one key/value head."""
    return replace(case, spec=replace(case.spec, k_heads=1, v_heads=1))


@pytest.mark.parametrize("name", PAIRS)
@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(data=st.data())
def test_attention_is_that_of_the_stored_latents(
    kernels: Kernels,  # noqa: F811
    name: str,
    data: st.DataObject,
) -> None:
    """Over mixed items, windows, chunks, head counts and terms; poison in every slot not written."""
    case = of_latents(data.draw(cases(PAIRS[name])))
    step = LatentStep(case, kernels)

    out_THD = step.attend_directly(kernels, step.items)

    assert step.error(out_THD) <= tolerance(case)


@pytest.mark.parametrize("name", PAIRS)
def test_with_dims_as_models_have_them(kernels: Kernels, name: str) -> None:  # noqa: F811
    """A latent of 512 dims and 64 rotated ones that are not quantised, under 16 query heads."""
    formats = replace(PAIRS[name], v=PAIRS["bfloat16"].v)
    spec = GroupSpec(
        name="group", kind=LayerKind.FULL, layers=(0, 1), k_heads=1, k_dim=512, v_heads=1, v_dim=64,
        itemsize=4, formats=(formats, formats),
    )  # fmt: skip
    case = Case(
        spec=spec, block_size=32, group_size=16, dtype=torch.bfloat16, prefix=0, has_nan=True,
        has_softcap=False, has_sinks=False, sharpness=1.0, seed=0,
        lengths=(
            Length(is_sharing=False, start=699, num_queries=1),
            Length(is_sharing=False, start=2, num_queries=5),
        ),
    )  # fmt: skip
    step = LatentStep(case, kernels)

    error = step.error(step.attend_directly(kernels, step.items))

    assert error <= {"float32": EXACT, "float16": ROUNDED, "bfloat16": ROUNDED}.get(name, QUANTISED)


@hypothesis.settings(max_examples=2 * NUM_EXAMPLES)
@given(case=cases())
def test_neither_others_nor_threads_change_a_bit(kernels: Kernels, case: Case) -> None:  # noqa: F811
    """Whether or not others read the same blocks, and whatever order the work is done in."""
    step = LatentStep(of_latents(case), kernels)

    together_THD = step.attend_directly(kernels, step.items)
    alone_THD = torch.zeros_like(together_THD)
    for item in step.items:
        alone_THD += step.attend_directly(kernels, [item], num_threads=2)

    assert torch.equal(alone_THD, together_THD)
