"""In which dtype an op computes."""

import torch


def compute_type(x) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
