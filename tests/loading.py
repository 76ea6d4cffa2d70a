"""Folders of images, batches of a loader, and whether they are the same."""

import numpy as np
import pytest
import torch


def write_folder(root, per_class=3):
    """Images of several shapes, each of one colour per class, brighter from image to image."""
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for k, name in enumerate(["ant", "bee"]):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = np.zeros((20 + 7 * i, 31 - 3 * i, 3), np.uint8)
                pixels[..., k] = 100 + 40 * i
                pixels[: len(pixels) // 2, :, 2] = 200
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def batches(loader, epoch=0, start_batch=0):
    loader.set_epoch(epoch, start_batch)
    return [(x.clone(), target.clone()) for x, target in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for p, q in zip(a, b) for s, t in zip(p, q))
