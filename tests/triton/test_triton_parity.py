"""The Triton kernels over the table of cases: in the CPU interpreter, or on the GPU where there is one."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qkernels import backend, reference, testing
from qkernels import triton as launchers


def chosen():
    """All cases on a GPU; in the interpreter, which is slow, those that show a setting for the first time."""
    seen = set()
    for case in testing.cases():
        if case.dtype == torch.float64:  # the reference's own, which the launchers hand on
            continue
        settings = {(case.op, case.option), (case.op, case.memory), (case.op, case.shape),
                    (case.op, case.dtype, case.granularity)}  # fmt: skip
        if torch.cuda.is_available() or not settings <= seen:
            yield case
        seen |= settings


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.id("triton"))
def test_parity(case, device, poisoned):
    args = case.args(device)
    kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in tree_leaves(args)]
    got = testing.backends(case.op, device)["triton"](*args)
    testing.compare(case, args, got, testing.wanted(case))
    for before, after in zip(kept, tree_leaves(args)):
        if isinstance(after, torch.Tensor):
            assert torch.equal(before.nan_to_num(nan=0.5), after.nan_to_num(nan=0.5)), "an input was written"


def test_float64_is_the_reference():
    case = testing.Case("fake_quantize_backward", (3, 8), torch.float64, "axis1", option="ewgs")
    for got, want in zip(
        launchers.fake_quantize_backward(*case.args()), reference.fake_quantize_backward(*case.args())
    ):
        assert got.dtype == torch.float64 and torch.equal(got, want)


def test_every_op_has_a_launcher():
    assert [name for name in backend.SCHEMAS if not hasattr(launchers, name)] == []
