"""Training runs: recipes, the loop, checkpoints, the run folder."""

from .bn import bn_reestimate
from .build import load_weights
from .config import make_config
from .recipe import available_recipes, load_recipe
from .run import train
from .start import load_run

__all__ = [
    "available_recipes",
    "bn_reestimate",
    "load_recipe",
    "load_run",
    "load_weights",
    "make_config",
    "train",
]
