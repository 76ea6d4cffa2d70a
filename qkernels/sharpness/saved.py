"""Results as JSON files: written in one step, read back whole, and told apart by the weights they are of."""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, overload

import torch

from .. import files
from ..annotations import File, StrPath

Read = TypeVar("Read", bound="Saved")


@dataclass
class Saved:
    """A dataclass that is written as JSON and read back."""

    def to_dict(self) -> dict[str, Any]:
        """What is written."""
        return asdict(self)

    @overload
    def to_json(self, path: None = None) -> str: ...

    @overload
    def to_json(self, path: File) -> File: ...

    def to_json(self, path: File | None = None) -> File | str:
        """Write it, atomically, and return the path; without a path return the text."""
        if path is None:
            return files.json_text(finite(self.to_dict()))
        write_json(path, self.to_dict())
        return path

    @classmethod
    def from_json(cls: type[Read], path: StrPath) -> Read:
        """Read what to_json wrote; ValueError where the file holds something else."""
        values = files.read_object(path)
        if values is None or set(values) != cls._fields():
            raise ValueError(f"path must be the {cls.__name__} of a to_json, {path} is not")
        return cls(**values)

    @classmethod
    def _fields(cls):
        return set(cls.__dataclass_fields__)


def digest(tensors):
    """A name for these numbers; their sum would depend on the threads that add them."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def write_json(path, value):
    """Write a file whole; a measure that is infinite or NaN becomes null."""
    files.write_json(path, finite(value))


def finite(value):
    """The same with None for what is infinite or NaN."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
