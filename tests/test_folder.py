"""Folders of images: good and damaged ones, batches that a seed determines, workers."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from loading import batches, same, write_folder

from qkernels.training.data import build_data
from qkernels.training.folder import centre_box, random_box


def test_folder_reads_classes_in_order(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = build_data(f"folder:{root}", 4, image_size=16, workers=0)
    assert (data.train_size, data.test_size, data.num_classes) == (6, 6, 2)
    assert (data.in_channels, data.image_size, data.name) == (3, 16, "folder")
    x, target = (torch.cat(tensors) for tensors in zip(*data.test))
    assert x.shape == (6, 3, 16, 16) and target.tolist() == [0, 0, 0, 1, 1, 1]
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (x * std + mean) * 255
    for i, label in enumerate(target):
        torch.testing.assert_close(
            pixels[i, label], torch.full((16, 16), 100.0 + 40 * (i % 3)), rtol=0, atol=1e-3
        )
        assert pixels[i, 2, 0].mean() > 190 and pixels[i, 2, -1].mean() < 10


@pytest.mark.parametrize("epoch", [0, 3])
def test_folder_batches_do_not_depend_on_the_workers(tmp_path, epoch):
    spec = f"folder:{write_folder(tmp_path)}"
    loaders = [build_data(spec, 2, seed=1, image_size=8, workers=w).train for w in (0, 2)]
    whole = batches(loaders[0], epoch)
    state = torch.get_rng_state()
    assert len(whole) == 3 and same(whole, batches(loaders[1], epoch))
    assert same(whole[1:], batches(loaders[1], epoch, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(whole, batches(loaders[0], epoch + 1))


def test_folder_workers_stop_with_the_last_reference(tmp_path):
    loader = build_data(f"folder:{write_folder(tmp_path)}", 2, image_size=8, workers=1).train
    batches(loader)
    (process,), alive = loader.workers._iterator._workers, weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert alive() is None and not process.is_alive()
    finally:
        gc.enable()


def test_folder_ranks_share_the_epoch_of_a_single_process(tmp_path):
    spec = f"folder:{write_folder(tmp_path)}"
    ((x, target),) = batches(build_data(spec, 6, image_size=8, workers=0).train)
    for rank in range(2):
        loader = build_data(spec, 3, image_size=8, workers=0, rank=rank, world_size=2).train
        assert same(batches(loader), [(x[rank::2], target[rank::2])])


def test_folder_without_augmentation_shows_the_whole_centre(tmp_path):
    data = build_data(f"folder:{write_folder(tmp_path)}", 6, augment=False, image_size=8, workers=0)
    ((x, target),), ((plain, labels),) = data.train, data.train_eval
    assert {r.numpy().tobytes() for r in x} == {
        r.numpy().tobytes() for r in plain
    } and target.sum() == labels.sum()


def test_folder_images_are_cropped_and_mirrored_anew_in_every_epoch(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels = np.add.outer(2 * np.arange(64), 2 * np.arange(64)).astype(np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    loader = build_data(f"folder:{tmp_path}", 1, image_size=16, workers=0).train
    seen = torch.cat([batches(loader, epoch)[0][0] for epoch in range(100)])
    assert len(seen.unique(dim=0)) > 90
    assert 0.3 < (seen[:, 0, 8, 0] > seen[:, 0, 8, -1]).float().mean() < 0.7


def test_random_boxes_have_inceptions_areas_ratios_and_places():
    rng, (width, height) = np.random.default_rng(0), (400, 300)
    left, top, right, bottom = np.array([random_box(width, height, rng) for _ in range(2000)], float).T
    area, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert 0.08 * 0.97 < area.min() < 0.1 and area.max() > 0.8
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert 0 <= left.min() and 0 <= top.min() and right.max() <= width and bottom.max() <= height
    small = area < 0.2
    assert left[small].min() < 30 and right[small].max() > width - 30
    assert top[small].min() < 20 and bottom[small].max() > height - 20
    assert centre_box(width, height) == (68.75, 18.75, 331.25, 281.25)


def test_folder_errors_are_named(tmp_path, missing):
    root = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match="image_size=0: expected an integer of at least 1"):
        build_data(f"folder:{root}", 2, image_size=0)
    with pytest.raises(ValueError, match="workers=-1: expected an integer of at least 0"):
        build_data(f"folder:{root}", 2, workers=-1)
    with pytest.raises(ValueError, match="spec='folder': the data set lies in a folder; expected folder:DIR"):
        build_data("folder", 2)
    (root / "val" / "cat").mkdir()
    (root / "val" / "cat" / "notes.txt").touch()
    with pytest.raises(
        FileNotFoundError, match="val has class folders without images: cat; accepted suffixes: .jpeg"
    ):
        build_data(f"folder:{root}", 2)
    (root / "val" / "cat" / "0.JPG").touch()
    with pytest.raises(ValueError, match="val has the class 'cat', which train lacks"):
        build_data(f"folder:{root}", 2)
    shutil.rmtree(root / "val" / "cat")
    (root / "val" / "bee" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2.png: not a readable image"):
        list(build_data(f"folder:{root}", 2, workers=0).test)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="train holds no <class>/<image> file"):
        build_data(f"folder:{tmp_path}/empty", 2)
    with pytest.raises(FileNotFoundError, match="train is missing; expected DIR/train/<class>/\\*.jpg"):
        build_data(f"folder:{root}/train", 2)
    missing("PIL")
    with pytest.raises(
        ImportError, match=r"spec='folder:DIR': needs Pillow \(pip install qkernels\[train\]\)"
    ):
        build_data(f"folder:{root}", 2)
