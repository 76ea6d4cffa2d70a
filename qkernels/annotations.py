"""What the annotations of several modules name."""

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

Integer = int | np.integer  # where NumPy's are taken too
StrPath = str | os.PathLike[str]
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, target) -> mean loss of a batch
Progress = Callable[[str, int, int], object]  # (what, done, of)

# What comes back as it was given.
Model = TypeVar("Model", bound=nn.Module)
File = TypeVar("File", bound=StrPath)
