"""Attention by the kernels against attention in fp64 over the same stored values, over random steps."""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.native import MOST_QUERIES, Isa, Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import GroupSpec, KVFormat, LayerFormat, LayerKind
from tests.attention_steps import LAYER, Case, Length, Step, cases

PAIRS = {
    "float32": LayerFormat(KVFormat.FLOAT32, KVFormat.FLOAT32),
    "float16": LayerFormat(KVFormat.FLOAT16, KVFormat.FLOAT16),
    "bfloat16": LayerFormat(KVFormat.BFLOAT16, KVFormat.BFLOAT16),
    "fp8": LayerFormat(KVFormat.FP8, KVFormat.FP8),
    "int8": LayerFormat(KVFormat.INT8, KVFormat.INT8),
    "int4": LayerFormat(KVFormat.INT4, KVFormat.INT4),
    "k8v4": LayerFormat(KVFormat.INT8, KVFormat.INT4),
}
# Of a query, over all its heads: the norm of what is wrong over the norm of the result, beside what the
# result loses in its dtype. Terms that happen to cancel count as if they were orthogonal.
EXACT, ROUNDED, QUANTISED = 1e-5, 2e-3, 6e-3
# Where nothing averages out: a weight that is rounded to bf16 loses so much.
ROUNDED_ONCE = 2.0**-8
IS_CI = hypothesis.settings.get_current_profile_name() == "ci"
NUM_EXAMPLES = 12 if IS_CI else max(25, hypothesis.settings().max_examples // 4)


@pytest.fixture(scope="module", params=list(Isa), ids=lambda isa: isa.name.lower())
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The kernels of one instruction set; skips where there are none, or not that one."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    before = found.isa
    try:
        if found.use_isa(request.param) is not request.param:
            pytest.skip(f"no {request.param.name.lower()} here")
        yield found
    finally:
        found.use_isa(before)


def tolerance(case: Case) -> float:
    """How far a result may be off, also of one head and few positions."""
    formats = case.spec.formats[LAYER]
    if formats.k.is_quantised or formats.v.is_quantised:
        return QUANTISED
    return EXACT if formats == PAIRS["float32"] else ROUNDED_ONCE


@pytest.mark.parametrize("name", PAIRS)
@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(data=st.data())
def test_attention_is_that_of_the_stored_values(
    kernels: Kernels, name: str, data: st.DataObject
) -> None:
    """Over mixed items, windows, chunks, head groupings and terms; poison in every slot not written."""
    case = data.draw(cases(PAIRS[name]))
    step = Step(case, kernels)

    out_THD = step.attend()

    assert out_THD.dtype is case.dtype
    assert step.error(out_THD) <= tolerance(case)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dim", [64, 128])
def test_with_heads_as_models_have_them_errors_average_out(
    kernels: Kernels, name: str, dim: int
) -> None:
    """32 query heads on 8 key/value heads, one request with a long past and one that has just begun."""
    spec = GroupSpec(
        name="group", kind=LayerKind.FULL, layers=(0, 1), k_heads=8, k_dim=dim, v_heads=8, v_dim=dim,
        itemsize=4, formats=(PAIRS[name], PAIRS[name]),
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = Case(
            spec=spec, block_size=32, group_size=4, dtype=dtype, prefix=0, has_nan=True, has_softcap=False,
            has_sinks=False, sharpness=1.0, seed=0,
            lengths=(
                Length(is_sharing=False, start=699, num_queries=1),
                Length(is_sharing=False, start=2, num_queries=5),
            ),
        )  # fmt: skip
        step = Step(case, kernels)

        error = step.error(step.attend())

        assert error <= {"float32": EXACT, "float16": ROUNDED, "bfloat16": ROUNDED}.get(
            name, QUANTISED
        )


@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(case=cases(most_queries=4 * MOST_QUERIES))
def test_items_of_many_queries_are_left_to_torch(kernels: Kernels, case: Case) -> None:
    """Each item's result lies in its own rows, whoever computes it. Torch needs q in the dtype of K/V."""
    step = Step(replace(case, dtype=torch.float32), kernels)

    assert step.error(step.attend()) <= tolerance(case)


@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(case=cases(), slope=st.floats(-0.1, 0.5))
def test_a_slope_favours_later_positions(kernels: Kernels, case: Case, slope: float) -> None:
    """ALiBi adds a multiple of the position to the score, beside everything else that a score is made of."""
    step = Step(case, kernels)
    slopes_H = slope * torch.rand(step.q_1HTD.shape[1])

    out_THD = step.attend_directly(kernels, step.items, alibi_slopes_H=slopes_H)

    assert step.error(out_THD, slopes_H) <= tolerance(case)


@hypothesis.settings(max_examples=2 * NUM_EXAMPLES)
@given(case=cases())
def test_an_item_alone_gets_the_bits_that_it_gets_among_others(
    kernels: Kernels, case: Case
) -> None:
    """Whether or not others read the same blocks."""
    step = Step(case, kernels)

    together_THD = step.attend_directly(kernels, step.items)
    alone_THD = torch.zeros_like(together_THD)
    for item in step.items:
        alone_THD += step.attend_directly(kernels, [item])

    assert torch.equal(alone_THD, together_THD)


@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(case=cases())
def test_the_number_of_threads_changes_no_bit(kernels: Kernels, case: Case) -> None:
    """Whatever order the parts of the work are done in."""
    step = Step(case, kernels)

    one_THD, two_THD, three_THD = (
        step.attend_directly(kernels, step.items, num_threads) for num_threads in (1, 2, 3)
    )

    assert torch.equal(one_THD, two_THD)
    assert torch.equal(one_THD, three_THD)
