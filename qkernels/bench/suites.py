"""Which rows form a suite."""

import functools
from dataclasses import replace

import torch

from .. import testing
from . import distance, lists, rows, train

NOISY = ("tempering", "after")


def suite(name, device, only=""):
    """The rows of a suite whose name contains ``only`` (of "bars": a, b or c, the bars of one issue), one at a time."""
    issue = only if name == "bars" and only in ISSUES else ""
    for build in ISSUES[issue] if issue else SUITES[name]:
        for row in build(device):
            if issue or only in row.name:
                yield row


def _quantizer(cases, device):
    for case in cases():
        yield rows.quantizer_row(case, device)


def _plain():
    return [c for name in ("activation", "weight", "linear") for c in testing.timed(name, "fake_quantize")]


def _noisy():
    return [
        replace(case, option=option) for case in testing.timed("noise", "fake_quantize") for option in NOISY
    ]


def _smoke():
    plain = next(testing.timed("weight", "fake_quantize", (torch.float32,)))
    return [plain, replace(plain, option=NOISY[0])]


def _tempering():
    return [replace(next(testing.timed("noise", "fake_quantize")), option=NOISY[0])]


def _bars():
    """Per tensor; of the activations the first shape alone, whose ratios the larger one repeats."""
    activations = list(testing.timed("activation", "fake_quantize"))
    first = [case for case in activations if case.shape == activations[0].shape]
    return [c for c in (*first, *testing.timed("weight", "fake_quantize")) if c.granularity == "tensor"]


def _integers(device):
    for op in ("quantize", "dequantize"):
        for case in testing.timed("weight", op, (torch.float32,)):
            yield rows.op_row(case, device)


def _of(cases):
    return functools.partial(_quantizer, cases)


_ONE = functools.partial(rows.on, min)
_ALL = functools.partial(rows.on, max)
ISSUES = {
    "a": (_of(_bars), functools.partial(_ALL, functools.partial(train.plain_step, compiled=False))),
    "b": (
        functools.partial(_ONE, _of(_tempering)),
        functools.partial(distance.suite, dtypes=(torch.float32,)),
    ),
    "c": (functools.partial(_ALL, lists.perturbed), lists.copies, functools.partial(_ALL, train.saq_steps)),
}
SUITES = {
    "smoke": (_of(_smoke),),
    "kernels": (_of(_plain), _of(_noisy), distance.suite, _integers),
    "train": (train.plain_step, train.saq_steps),
    "sharpness": (lists.perturbed, lists.copies),
    "bars": (*ISSUES["a"], *ISSUES["b"], *ISSUES["c"]),
}
