"""The standardised distance against its definition: values, gradients, bits, bad input."""

import pytest
import torch
from distances import definition, pair

import qkernels as qk
from qkernels import backend, reference
from qkernels.ops import standardized_distance

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Runs, columns, several blocks, tails of every width, single channels and single samples.
SHAPES = {(4, 5, 7, 9): 1, (3, 300): 1, (2, 7, 33): 2, (2, 3, 37, 41): 1, (1, 4, 150, 150): 1, (70, 3, 2, 2): 1,
          (5, 1, 40, 40): 1, (9000, 3): 1, (3, 2, 5, 5, 6): 1, (1, 7): 1, (6, 257, 3, 3): 1, (3, 4, 8): 0}  # fmt: skip


def with_gradient(distance, student, *args, **kwargs):
    student = student.detach().requires_grad_()
    loss = distance(student, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def assert_is_definition(student, teacher, tolerance=1e-5, **arguments):
    got = with_gradient(standardized_distance, student, teacher, **arguments)
    wanted = with_gradient(definition, student.double(), teacher.double(), **arguments)
    assert abs(got[0].item() - wanted[0].item()) <= 1e-5 * wanted[0].item()
    assert (got[1].double() - wanted[1]).abs().max() <= tolerance * wanted[1].abs().max()
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distance_is_its_definition_in_value_and_gradient(shape, dtype):
    student, teacher = pair(shape, dtype)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)
    for reduction in ("sum", "mean"):
        if shape == (1, 7):  # a single sample is its own mean
            got = with_gradient(standardized_distance, student, teacher, reduction=reduction)
            assert got[0] == 0 and not got[1].any()
        else:
            assert_is_definition(student, teacher, tolerance, axis=SHAPES[shape], reduction=reduction)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_formats_agree(name, dtype):
    if name == "native" and "cpu" in backend.why_not:
        pytest.skip("the CPU library is not built")
    student, teacher = pair((3, 20, 6, 7), dtype)
    last = torch.channels_last
    with qk.use_backend(name):
        wanted = with_gradient(standardized_distance, student, teacher)
        for s, t in ((student.to(memory_format=last), teacher), (student, teacher.to(memory_format=last)),
                     (student.to(memory_format=last), teacher.to(memory_format=last)),
                     (student[..., ::2].repeat_interleave(2, -1)[..., ::2], teacher[..., ::2])):  # fmt: skip
            got = with_gradient(standardized_distance, s, t)
            if s.shape == student.shape:
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
                assert got[1].stride() == s.stride()
            else:
                torch.testing.assert_close(
                    got[0].double(), definition(s.double(), t.double()), rtol=1e-5, atol=0
                )


def test_backward_equals_the_reference_bit_for_bit():
    for shape, axis in SHAPES.items():
        for dtype in FLOATS:
            student, teacher = (x.detach() for x in pair(shape, dtype))
            distance, moments = torch.ops.qkernels.standardized_distance(student, teacher, axis, 1e-5, True)
            expected = reference.standardized_distance(student, teacher, axis, 1e-5, True)
            torch.testing.assert_close((distance, moments), expected, rtol=1e-6, atol=1e-9)
            grad = torch.linspace(-1, 2, distance.numel(), dtype=distance.dtype)
            arguments = grad, student, teacher, moments, axis, 1e-5, True
            got = torch.ops.qkernels.standardized_distance_backward(*arguments)
            assert torch.equal(got, reference.standardized_distance_backward(*arguments)), (shape, dtype)


def test_a_mean_of_a_hundred_deviations_keeps_the_accuracy():
    for memory in (torch.contiguous_format, torch.channels_last):
        student, teacher = pair((8, 6, 14, 14), mean=100.0)
        teacher = teacher - 50.0
        assert_is_definition(student.to(memory_format=memory), teacher.to(memory_format=memory))


def test_a_student_near_its_teacher_has_an_accurate_distance():
    student, teacher = pair((8, 6, 14, 14))
    student = (teacher + 1e-4 * student).detach()
    # The gradient is a difference of terms ten thousand times larger, in float32 as the definition's own.
    loss, _ = assert_is_definition(student, teacher, tolerance=0.05)
    assert 0 < loss < 1e-6
    assert standardized_distance(teacher, teacher) == 0


def test_constant_channels_have_distance_and_gradient_zero_or_finite():
    student, teacher = pair((4, 3, 5, 5))
    student, teacher = student.detach().clone(), teacher.clone()
    student[:, 0] = teacher[:, 0] = 3.1
    student[:, 1] = -7.3
    loss, ds = assert_is_definition(student, teacher, axis=1)
    assert not ds[:, 0].any() and ds.isfinite().all() and loss.isfinite()


def test_not_a_number_stays_in_its_channel():
    student, teacher = (x.detach() for x in pair((4, 3, 5, 5)))
    student[2, 1, 0, 0] = float("nan")
    distance, _ = torch.ops.qkernels.standardized_distance(student, teacher, 1, 1e-5, False)
    assert distance.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_bits_for_any_number_of_threads(memory):
    student, teacher = pair((16, 33, 14, 14))
    student, teacher = student.to(memory_format=memory), teacher.to(memory_format=memory)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradient(standardized_distance, student, teacher))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_first_and_second_derivatives(axis):
    student, teacher = pair((3, 4, 5), torch.float64)
    for reduction in ("sum", "mean"):

        def distance(s, reduction=reduction):
            return standardized_distance(s, teacher, axis=axis, reduction=reduction)

        assert torch.autograd.gradcheck(distance, student, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(distance, student)


def test_third_derivative():
    student, teacher = pair((3, 2), torch.float64)

    def curvature(f):
        hessian = torch.func.jacrev(torch.func.jacrev(lambda s: f(s, teacher)))
        return torch.func.grad(lambda s: hessian(s).square().sum())(student.detach())

    torch.testing.assert_close(curvature(standardized_distance), curvature(definition))


def test_vmap_and_compile_give_what_a_loop_gives():
    student, teacher = pair((6, 4, 5, 3, 3))
    student = student.detach()
    expected = torch.stack([standardized_distance(s, t) for s, t in zip(student, teacher)])
    torch.testing.assert_close(torch.vmap(standardized_distance)(student, teacher), expected)
    shared = torch.stack([standardized_distance(s, teacher[0]) for s in student])
    mapped = torch.vmap(standardized_distance, in_dims=(1, None))(student.movedim(0, 1), teacher[0])
    torch.testing.assert_close(mapped, shared)
    gradients = torch.stack([with_gradient(standardized_distance, s, t)[1] for s, t in zip(student, teacher)])
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(standardized_distance))(student, teacher), gradients
    )
    compiled = torch.compile(lambda s, t: standardized_distance(s, t), fullgraph=True, backend="aot_eager")
    for s, t in ((student[0], teacher[0]), (student[1].to(memory_format=torch.channels_last), teacher[1])):
        for got, wanted in zip(with_gradient(compiled, s, t), with_gradient(standardized_distance, s, t)):
            assert torch.equal(got, wanted)


def test_transforms_inside_compile():
    """Compilers look past the backward of a Function there."""
    student, teacher = pair((3, 4, 5, 2))
    student = student.detach()

    def second(s, t):
        return torch.func.grad(lambda s: torch.func.grad(standardized_distance)(s, t).pow(2).sum())(s)

    for f in (torch.func.grad(standardized_distance), second):
        for g, other in ((f, teacher), (torch.vmap(f, (0, None)), teacher[0]), (torch.vmap(f), teacher)):
            compiled = torch.compile(g, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(student, other), g(student, other), rtol=1e-4, atol=1e-6)


def test_ops_are_registered_rightly():
    student, teacher = pair((3, 4, 5, 2))
    student = student.detach()
    moments = torch.ops.qkernels.standardized_distance(student, teacher, 1, 1e-5, True)[1]
    checks = ("test_schema", "test_faketensor")
    settings = (1, 1e-5, True)
    for s in (student, student.to(memory_format=torch.channels_last)):
        torch.library.opcheck(
            torch.ops.qkernels.standardized_distance.default, (s, teacher, *settings), test_utils=checks
        )
        torch.library.opcheck(
            torch.ops.qkernels.standardized_distance_backward.default,
            (torch.ones(4), s, teacher, moments, *settings),
            test_utils=checks,
        )


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((torch.ones(2, 3).int(), torch.ones(2, 3)), TypeError, "student must be a float32"),
        ((torch.ones(2, 3), [1.0]), TypeError, "teacher must be a float32.*got list"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"teacher must have student's shape \(2, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), TypeError, "teacher must have student's dtype"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), ValueError, "teacher must be on cpu.*got meta"),
        ((torch.ones(0, 3), torch.ones(0, 3)), ValueError, r"element in every channel, got shape \(0, 3\)"),
        ((torch.ones(3), torch.ones(3)), ValueError, "two dimensions or more"),
    ],
)
def test_bad_tensors(arguments, error, text):
    with pytest.raises(error, match=text):
        standardized_distance(*arguments)


def test_bad_options():
    x = torch.ones(2, 3)
    for options, text in (({"axis": 2}, r"axis must be in \[-2, 2\), got 2"), ({"eps": 0.0}, "eps must be positive"),
                          ({"reduction": "none"}, "reduction must be 'sum' or 'mean', got 'none'")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            standardized_distance(x, x, **options)
