"""The standardised distance as it is defined, and a student with its teacher."""

import torch


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
