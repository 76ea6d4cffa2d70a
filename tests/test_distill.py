"""Distillation: the hooks around a student and its teacher."""

import copy
import gc
import io
import weakref

import pytest
import torch
from distances import definition, pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk


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


@pytest.mark.parametrize("before", [False, True])
def test_compiled_student_and_teacher(setting, before):
    student, teacher, x = setting
    plain = qk.distill.FeatureDistillation(student, teacher)
    student(x)
    expected = plain.loss(x)
    plain.remove()
    compiled = [torch.compile(m, backend="aot_eager") for m in (student, teacher)]
    if before:  # graphs that are there already
        for model in compiled:
            model(x)
    distill = qk.distill.FeatureDistillation(*compiled)
    for _ in range(2):
        compiled[0](x)
        loss = distill.loss(x)
        torch.testing.assert_close(loss, expected)
    student.zero_grad()
    loss.backward()
    assert student.conv1.weight.grad.any()


def test_distributed(setting, one_process):
    student, teacher, x = setting
    model = DistributedDataParallel(student)
    distill = qk.distill.FeatureDistillation(model, teacher)
    assert list(distill.axes) == LAYERS
    (model(x).sum() + distill.loss(x)).backward()
    assert student.conv1.weight.grad.isfinite().all()


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
    shared = copy.deepcopy(teacher).train()
    shared.norm = student.norm
    with pytest.raises(ValueError, match="share no module with student.* got norm"):
        make(student, shared)
    assert student.norm.training
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_copies_and_files_of_a_student_record_nothing(setting):
    """Neither what the student's last forward left nor the hooks stand in their way."""
    student, teacher, x = setting
    distill = qk.distill.FeatureDistillation(student, teacher)
    y = student(x)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    for other in (copy.deepcopy(student), torch.load(file, weights_only=False)):
        other(torch.zeros_like(x))
        torch.testing.assert_close(other(x), y)
    distill.loss(x).backward()
    assert student.conv1.weight.grad.abs().sum() > 0


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
