"""Distillation: the standardised distance against its definition, and the hooks around a student and its teacher."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk
from qkernels import backend, reference
from qkernels.ops import standardized_distance

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Runs, columns, several blocks, tails of every width, single channels and single samples.
SHAPES = {(4, 5, 7, 9): 1, (3, 300): 1, (2, 7, 33): 2, (2, 3, 37, 41): 1, (1, 4, 150, 150): 1, (70, 3, 2, 2): 1,
          (5, 1, 40, 40): 1, (9000, 3): 1, (3, 2, 5, 5, 6): 1, (1, 7): 1, (6, 257, 3, 3): 1, (3, 4, 8): 0}  # fmt: skip


def definition(student, teacher, axis=1, eps=1e-5, reduction="mean"):
    others = [d for d in range(student.dim()) if d != axis % student.dim()]

    def standardized(x):
        variance = x.var(others, keepdim=True, unbiased=False)
        return (x - x.mean(others, keepdim=True)) / torch.sqrt(variance + eps)

    total = (standardized(teacher) - standardized(student)).square().sum()
    return total / (student.numel() // student.shape[axis]) if reduction == "mean" else total


def pair(shape, dtype=torch.float32, mean=0.5, spread=0.3, seed=0):
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=random, dtype=torch.float64) + mean
    teacher = student * 1.5 + spread * torch.randn(shape, generator=random, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.head = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv2(self.norm(self.conv1(x)).relu())
        return self.head(x.mean((2, 3)))


LAYERS = ["conv1", "conv2", "head"]


@pytest.fixture
def setting():
    torch.manual_seed(0)
    teacher = Net()
    student = qk.quantize_(copy.deepcopy(teacher), qk.QConfig(method="lsq", weight_bits=4, act_bits=4))
    x = torch.rand(6, 2, 6, 6)
    student(x)
    return student, teacher, x


def features(model, x):
    kept, modules = {}, dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, a, y, n=n: kept.__setitem__(n, y)) for n in LAYERS]
    model(x)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_sums_the_layers(setting, reduction):
    student, teacher, x = setting
    distill = qk.distill.FeatureDistillation(student, teacher, reduction=reduction, weight=0.5)
    assert list(distill.axes) == LAYERS
    student(x)
    loss = distill.loss(x)
    s, t = features(student, x), features(teacher.eval(), x)
    expected = 0.5 * sum(definition(s[n], t[n], reduction=reduction) for n in LAYERS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    student.zero_grad()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.conv1.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(setting):
    student, teacher, x = setting
    before = copy.deepcopy(teacher.state_dict())
    distill = qk.distill.FeatureDistillation(student=student, teacher=teacher, reduction="mean")
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.02), []
    for _ in range(20):
        student.train()
        teacher.train()
        student(x)
        loss = distill.loss(x)
        assert not teacher.training and student.training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in student.state_dict())


def test_references_are_released_and_hooks_go(setting):
    student, teacher, x = setting

    def hooks():
        modules = (*student.modules(), *teacher.modules())
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    before = hooks()
    with qk.distill.FeatureDistillation(student, teacher) as distill:
        assert hooks() != before
        alive = []
        hook = student.conv1.register_forward_hook(lambda m, a, y: alive.append(weakref.ref(y)))
        student(x)
        distill.loss(x).backward()
        gc.collect()
        assert alive.pop()() is None
        with torch.no_grad():
            student.eval()
            student(x)
        assert alive.pop()() is None
        with pytest.raises(RuntimeError, match="loss needs a forward of the student before it"):
            distill.loss(x)
        hook.remove()
        student(x)
        distill.loss(x)
        with pytest.raises(RuntimeError, match="forward of the student"):
            distill.loss(x)
    assert hooks() == before


def test_only_the_last_forward_counts_and_shared_layers_count_twice(setting):
    student, teacher, x = setting
    distill = qk.distill.FeatureDistillation(student, teacher, layers=["conv1"])
    student(x + 1)
    student(x)
    student.conv1(x + 2)  # outside a forward of the student
    once = distill.loss(x)

    class Twice(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) + self.net(x)

    distill.remove()
    wrapper = Twice(student)
    other = qk.distill.FeatureDistillation(wrapper, Twice(teacher), layers=["net.conv1"])
    wrapper(x)
    torch.testing.assert_close(other.loss(x), 2 * once)


def test_mixed_precision_and_scaler(setting):
    student, teacher, x = setting
    distill = qk.distill.FeatureDistillation(student, teacher)
    student(x)
    full = distill.loss(x)
    with torch.autocast("cpu", torch.bfloat16):
        student(x)
        loss = distill.loss(x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.2, atol=0)
    (loss * 1024).backward()
    assert student.conv1.weight.grad.isfinite().all()


def test_compiled_student_and_teacher(setting):
    student, teacher, x = setting
    plain = qk.distill.FeatureDistillation(student, teacher)
    student(x)
    expected = plain.loss(x)
    plain.remove()
    compiled = [torch.compile(m, backend="aot_eager") for m in (student, teacher)]
    distill = qk.distill.FeatureDistillation(*compiled)
    for _ in range(2):
        compiled[0](x)
        loss = distill.loss(x)
        torch.testing.assert_close(loss, expected)
    student.zero_grad()
    loss.backward()
    assert student.conv1.weight.grad.any()


def test_distributed(setting, tmp_path):
    student, teacher, x = setting
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(student)
        distill = qk.distill.FeatureDistillation(model, teacher)
        assert list(distill.axes) == LAYERS
        (model(x).sum() + distill.loss(x)).backward()
        assert student.conv1.weight.grad.isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


def test_activation_checkpointing_leaves_nothing(setting):
    student, teacher, x = setting
    forward = student.forward
    student.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    distill = qk.distill.FeatureDistillation(student, teacher)
    output = student(x)
    (output.sum() + distill.loss(x)).backward()
    assert not distill._student.outputs


def test_bad_models(setting):
    student, teacher, x = setting
    make = qk.distill.FeatureDistillation
    with pytest.raises(ValueError, match="no quantized convolution or linear"):
        make(copy.deepcopy(teacher), teacher)
    with pytest.raises(ValueError, match="names of student's modules, got 'conv9'"):
        make(student, teacher, layers=["conv1", "conv9"])
    with pytest.raises(ValueError, match="names of student's modules, got none"):
        make(student, teacher, layers=[])
    with pytest.raises(ValueError, match="it lacks conv1, conv2, head"):
        make(student, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="another model than student"):
        make(student, student)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'none'"):
        make(student, teacher, reduction="none")
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_bad_forwards(setting):
    student, teacher, x = setting
    distill = qk.distill.FeatureDistillation(student, teacher)
    student(x)
    with pytest.raises(
        ValueError, match=r"conv1: the student's output has shape \(6, 4, 6, 6\), the teacher's \(5,"
    ):
        distill.loss(x[:5])
    distill.teacher = copy.deepcopy(teacher).to("meta")
    student(x)
    with pytest.raises(ValueError, match="teacher must be on cpu as student is, got meta"):
        distill.loss(x)
    student.norm.forward = lambda x: x.relu_()
    distill.teacher = teacher
    student(x)
    with pytest.raises(RuntimeError, match="output of conv1 was changed in place"):
        distill.loss(x)


def test_a_layer_without_a_tensor_is_named():
    student, teacher = (nn.Sequential(nn.LSTM(4, 4)) for _ in range(2))
    qk.distill.FeatureDistillation(student, teacher, layers=["0"])
    with pytest.raises(
        TypeError, match="layers: 0 returns a tuple; accepted are modules that return a tensor"
    ):
        student(torch.randn(2, 3, 4))


def test_logit_distillation():
    student, teacher = pair((5, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda s: qk.distill.logit_distillation(s, teacher, 3.0), student)
    p, q = (teacher / 3.0).softmax(1), (student / 3.0).softmax(1)
    expected = 9.0 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(qk.distill.logit_distillation(student, teacher, 3.0), expected)
    assert qk.distill.logit_distillation(student.half(), teacher.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        qk.distill.logit_distillation(student, teacher, 0)
    with pytest.raises(ValueError, match=r"shape \(5, 7\), got \(5, 6\)"):
        qk.distill.logit_distillation(student, teacher[:, :6])
