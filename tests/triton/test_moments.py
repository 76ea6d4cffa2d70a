"""The standardised distance in Triton against the reference: moments within a bound, gradients bit for bit."""

import pytest
import torch

from qkernels import reference
from qkernels import triton as launchers

SHAPES = {(4, 5, 7, 9): 1, (3, 300): 1, (2, 7, 33): 2, (2, 3, 67, 41): 1, (1, 1, 90, 90): 1, (600, 3): 1,
          (2, 3, 2, 2): 1, (2, 3, 8): 0}  # fmt: skip


def arguments(shape, dtype, memory, device):
    random = torch.Generator().manual_seed(len(shape))
    student = torch.randn(shape, generator=random) + 3.0
    teacher = 1.5 * student + torch.randn(shape, generator=random)
    if memory == "channels_last":
        student = student.movedim(1, -1).contiguous().movedim(-1, 1)
    return student.to(device, dtype), teacher.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, memory, dtype, device):
    student, teacher = arguments(shape, dtype, memory, device)
    settings = SHAPES[shape], 1e-5, memory == "contiguous"
    distance, moments = launchers.standardized_distance(student, teacher, *settings)
    expected, exact = reference.standardized_distance(student, teacher, *settings)
    torch.testing.assert_close(moments, exact, rtol=1e-6, atol=1e-6)
    # Products are rounded to float32, and the distance is a difference.
    n = 1 if settings[2] else student.numel() // distance.numel()
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-6 * n)
    grad = torch.linspace(-1.0, 2.0, distance.numel(), dtype=distance.dtype, device=device)
    for g in (grad, grad[:1].expand(distance.numel())):
        got = launchers.standardized_distance_backward(g, student, teacher, moments, *settings)
        assert got.stride() == student.stride() and got.dtype == dtype
        assert torch.equal(
            got, reference.standardized_distance_backward(g, student, teacher, moments, *settings)
        )


def test_equal_student_and_teacher_have_distance_zero(device):
    student, _ = arguments((4, 5, 7, 9), torch.float32, "contiguous", device)
    assert not launchers.standardized_distance(student, student, 1, 1e-5, False)[0].any()
