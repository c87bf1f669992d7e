"""AMX over bf16 K/V against attention in fp64: as close as products of floats, for any shape.

Skips where there is no AMX; `make check-native` runs it with AMX emulated.
"""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import given

from kvkeep.native import Isa, Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import KVFormat, LayerFormat
from tests.attention_steps import Case, Step, cases

BFLOAT16 = LayerFormat(KVFormat.BFLOAT16, KVFormat.BFLOAT16)
# Of a weight that is the sum of two bf16 numbers 2^-17 is lost at most; scores and sums lose what floats do.
ERROR = 2.0**-17 + 1e-5
IS_CI = hypothesis.settings.get_current_profile_name() == "ci"
NUM_EXAMPLES = 25 if IS_CI else max(50, hypothesis.settings().max_examples // 2)


@pytest.fixture(scope="module", params=[Isa.AMX], ids=["amx"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The kernels with AMX; skips where there is none."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    before = found.isa
    try:
        if found.use_isa(request.param) is not request.param:
            pytest.skip("no amx here")
        yield found
    finally:
        found.use_isa(before)


@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(case=cases(BFLOAT16))
def test_neither_weights_nor_queries_are_rounded_to_bf16(kernels: Kernels, case: Case) -> None:
    """Queries and results in float, so that nothing else is rounded; poison in every slot not written."""
    step = Step(replace(case, dtype=torch.float32), kernels)

    assert step.error(step.attend()) <= ERROR


@hypothesis.settings(max_examples=NUM_EXAMPLES)
@given(case=cases(BFLOAT16))
def test_queries_in_bf16_are_read_as_they_are(kernels: Kernels, case: Case) -> None:
    """They are not split as others are, and give the results of the same numbers in float."""
    step = Step(replace(case, dtype=torch.bfloat16), kernels)
    in_bf16_THD = step.attend_directly(kernels, step.items)

    step.q_1HTD = step.q_1HTD.float()
    in_float_THD = step.attend_directly(kernels, step.items)

    assert torch.equal(in_bf16_THD, in_float_THD.bfloat16())
