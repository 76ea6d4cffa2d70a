"""Inputs of the standardised distance and how far its sums may lie from the reference's."""

import torch

from .. import reference
from .quantizer import arrange

EPS = 1e-5


def compute_type(args):
    """In which the terms of the sums are rounded."""
    return reference.compute_type(args[0])


def legal(case):
    """Channels and samples, at least one of each."""
    return len(case.shape) > 1 and 0 not in case.shape


def _pair(case, device):
    """(student, teacher): correlated; the teacher in the student's memory format for the first option only."""
    random, settings = case.generator(), case.settings
    student = torch.randn(case.shape, generator=random) + (100.0 if settings.get("far") else 0.5)
    teacher = 1.5 * student + torch.randn(case.shape, generator=random)
    if settings.get("same"):
        teacher = student.clone()
    if settings.get("special"):
        student.view(-1)[0], teacher.view(-1)[-1] = torch.nan, torch.nan
    teacher = arrange(teacher.to(device, case.dtype), case.memory if case.option == "plain" else "contiguous")
    return arrange(student.to(device, case.dtype), case.memory), teacher


def distance(case, device):
    return *_pair(case, device), case.rows_axis()[1], EPS, not case.settings.get("sum", False)


def backward(case, device):
    student, teacher, axis, eps, mean = distance(case, device)
    grad = torch.linspace(-1.0, 2.0, student.shape[axis], dtype=compute_type((student,))).to(device)
    if case.settings.get("one_grad"):
        grad = grad[:1].expand(grad.shape)
    # Computed on the CPU, for the same bits on every device.
    moments = reference.moments.moments(*_pair(case, "cpu"), axis).to(device)
    return grad, student, teacher, moments, axis, eps, mean


def terms(args, output):
    student, axis = args[0], args[2]
    return student.numel() // student.shape[axis]


def magnitude(args, output):
    """The largest term of a channel's five means, which are of differences to one element.

    A term is rounded once; what is added up in float64 is rounded at every addition, as large as the whole sum.
    """
    student, teacher, axis, eps, mean = args
    n = terms(args, output)
    s, t = (x.double().movedim(axis, 0).reshape(-1, n) for x in (student, teacher))
    largest = torch.cat([s - s[:, :1], t - t[:, :1]], 1).nan_to_num(0.0).abs().amax(1)
    additions = torch.finfo(torch.float64).eps / torch.finfo(compute_type(args)).eps
    term = torch.maximum(largest, largest.square()) * (1 / n + additions)
    if output.dim() == 2:
        return term
    variance = torch.minimum(s.var(1, correction=0), t.var(1, correction=0)).nan_to_num(0.0)
    return term / (variance + eps) * (1 if mean else n)
