"""Sharpness-aware optimizers around any torch optimizer."""

from .sam import SAM
from .saq import SAQ

__all__ = ["SAM", "SAQ"]
