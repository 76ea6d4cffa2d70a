"""Readers of the published sets: CIFAR-10-C and CIFAR-100-C (.npy files), ImageNet-C (JPEG folders)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..annotations import Integer, StrPath
from .published import CORRUPTIONS, SEVERITIES, check_name, check_severity

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


def load_cifar_c(directory: StrPath, name: str, severity: Integer) -> tuple[torch.Tensor, torch.Tensor]:
    """One corruption at one severity of CIFAR-10-C or CIFAR-100-C, read from DIR/<name>.npy and
    DIR/labels.npy.

    Returns (images, labels): uint8 (N, 3, 32, 32) and int64 (N,), N = 10,000 in the published files, which
    hold the five severities one after another. Only the part asked for is read. ValueError for an unknown
    name or severity and for a file that is not such an array; FileNotFoundError for a missing file.
    """
    check_name(name)
    severity = check_severity(severity)
    images = _load_array(Path(directory), name)
    labels = _load_array(Path(directory), "labels")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        raise ValueError(
            f"{name}.npy in {directory} holds {images.dtype} {images.shape}; accepted: uint8 (5 N, 32, 32, 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels.npy in {directory} holds {labels.dtype} {labels.shape}; "
            f"accepted: integers ({len(images)},)"
        )
    count = len(images) // len(SEVERITIES)
    part = slice((severity - 1) * count, severity * count)
    planes = np.ascontiguousarray(images[part].transpose(0, 3, 1, 2))
    return torch.from_numpy(planes), torch.from_numpy(labels[part].astype(np.int64))


def _load_array(directory, stem):
    path = directory / f"{stem}.npy"
    if not path.is_file():
        if not directory.is_dir():
            raise FileNotFoundError(
                f"directory {directory} does not exist; it should hold the .npy files of CIFAR-C"
            )
        found = ", ".join(sorted(file.name for file in directory.glob("*.npy"))) or "no .npy file"
        raise FileNotFoundError(f"{path} does not exist; {directory} holds {found}")
    try:
        # Unlike np.load it takes .npy alone: a pickle or a zip archive under that name is refused.
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a complete .npy array: {error}") from error


class ImageNetC(torch.utils.data.Dataset[tuple[Any, int]]):
    """One corruption at one severity of ImageNet-C, from DIR/<name>/<severity>/<class>/*.JPEG, for a
    DataLoader.

    Item i is (image, label): `transform` of the PIL image or, without one, a uint8 tensor (3, H, W); label is
    the rank of the class folder's name. `classes` lists the folders, `samples` the (path, label) pairs.
    ValueError for an unknown name or severity; FileNotFoundError for a missing folder and for a class without
    images.
    """

    def __init__(
        self,
        directory: StrPath,
        name: str,
        severity: Integer,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        check_name(name)
        root = Path(directory) / name / str(check_severity(severity))
        if not root.is_dir():
            raise FileNotFoundError(f"{root} does not exist; {_what_is_there(Path(directory), name)}")
        self.transform = transform
        found = images_by_class(root)
        self.classes = list(found)
        self.samples = [(path, label) for label, paths in enumerate(found.values()) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        Image = pillow()
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is not a complete image file: {error}") from error
        if self.transform is not None:
            return self.transform(image), label
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()), label


def images_by_class(root):
    """{name: image files} of the class folders, all sorted; a hidden folder (.ipynb_checkpoints) is no class.

    FileNotFoundError where there is no image, and for a folder without images: as a class it would shift the labels
    of those after it.
    """
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
    found = {
        name: sorted(path for path in (root / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        for name in folders
    }
    accepted = f"accepted suffixes: {', '.join(IMAGE_SUFFIXES)}"
    if not any(found.values()):
        raise FileNotFoundError(f"{root} holds no <class>/<image> file; {accepted}")
    if empty := [name for name, paths in found.items() if not paths]:
        raise FileNotFoundError(f"{root} has class folders without images: {', '.join(empty)}; {accepted}")
    return found


def _what_is_there(directory, name):
    if not directory.is_dir():
        return f"directory {directory} does not exist either"
    place, expected = directory, f"some of {', '.join(CORRUPTIONS)}"
    if (directory / name).is_dir():
        place, expected = directory / name, ", ".join(map(str, SEVERITIES))
    found = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    return f"{place} holds {', '.join(found) or 'no folder'}; expected {expected}"


def pillow():
    """Pillow's Image module."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("JPEG images need Pillow: pip install qkernels[train]") from error
    return Image
