"""The standardised distance of two tensors (FPQ's CSD) and its gradient, from five moments per channel."""

import torch

from .. import layout
from .precision import compute_type


def _channelwise(values, x, axis):
    """One value per channel, shaped to broadcast against x."""
    return values.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def moments(student, teacher, axis):
    """(5, C) float64: mean of s, mean of t, variance of s, variance of t, covariance; all divided by n."""
    others = [d for d in range(student.dim()) if d != axis]
    s, t = student.double(), teacher.double()
    mean_s, mean_t = s.mean(others, keepdim=True), t.mean(others, keepdim=True)
    s, t = s - mean_s, t - mean_t
    centred = [(a * b).mean(others) for a, b in ((s, s), (t, t), (s, t))]
    return torch.stack([mean_s.flatten(), mean_t.flatten(), *centred])


def _sqrt(x):
    """The correctly rounded root of positive float64: torch's own on the CPU is an ulp off for one value in a hundred.

    One Newton step whose residue x - r * r is exact, by splitting r in two halves of 26 bits.
    """
    r = x.sqrt()
    high = r * 134217729.0
    high = high - (high - r)
    low = r - high
    return r + (((x - high * high) - 2.0 * high * low) - low * low) / (2.0 * r)


def _deviations(m, eps):
    return 1.0 / _sqrt(m[2] + eps), 1.0 / _sqrt(m[3] + eps)


def standardized_distance(student, teacher, axis, eps, mean):
    """sum over a channel of (t~ - s~)^2, divided by n where ``mean``:  s~ = (s - mean(s)) / sqrt(var(s) + eps)

        = n * (var_s r_s^2 + var_t r_t^2 - 2 cov r_s r_t),  r = 1 / sqrt(var + eps)

    Returns the distance of each channel, (C,), and ``moments``.
    """
    m = moments(student, teacher, axis)
    _, _, var_s, var_t, cov = m
    r_s, r_t = _deviations(m, eps)
    each = (var_s * r_s * r_s + var_t * r_t * r_t - 2.0 * (cov * r_s * r_t)).clamp(min=0.0)
    n = 1 if mean else student.numel() // student.shape[axis]
    return (each * n).to(compute_type(student)), m


def standardized_distance_backward(grad, student, teacher, moments, axis, eps, mean):
    """ds = p (s - mean_s) + q (t - mean_t),  p = 2 grad r_s^2 (eps r_s^2 + cov r_s r_t),  q = -2 grad r_s r_t.

    The means enter rounded to float32, exact where s is near them, and what rounding left out is added once.
    """
    dtype, each = compute_type(student), 1.0
    if mean:
        each = 1.0 / (student.numel() // student.shape[axis])
    mean_s, mean_t, _, _, cov = moments
    r_s, r_t = _deviations(moments, eps)
    factor = grad.double() * each
    p = 2.0 * factor * (r_s * r_s) * (eps * (r_s * r_s) + cov * r_s * r_t)
    q = -2.0 * factor * r_s * r_t
    near_s, near_t = mean_s.to(dtype), mean_t.to(dtype)
    rest = p * (near_s.double() - mean_s) + q * (near_t.double() - mean_t)
    like = layout.dense(student)
    p, q, near_s, near_t, rest = (_channelwise(v.to(dtype), like, axis) for v in (p, q, near_s, near_t, rest))
    ds = p * (like.to(dtype) - near_s) + (q * (layout.aligned(teacher, like).to(dtype) - near_t) + rest)
    return layout.aligned(ds.to(student.dtype), like)
