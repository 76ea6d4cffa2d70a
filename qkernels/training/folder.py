"""The folder:DIR data set: JPEG files in the ImageNet layout, decoded by worker processes."""

import math
import weakref

import numpy as np
import torch

from qkernels.corruptions.readers import images_by_class
from qkernels.training.data import IMAGENET_MEAN, IMAGENET_STD, Data, Loader


def folder_data(directory, batch_size, augment, image_size, workers, options):
    """`Data` of DIR/train and DIR/val; see `build_data`."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("spec='folder:DIR': needs Pillow (pip install qkernels[train])") from error
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size={image_size!r}: expected an integer of at least 1")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers={workers!r}: expected an integer of at least 0")
    classes, train_files = _scan(directory / "train")
    test_classes, test_files = _scan(directory / "val")
    if unknown := sorted(set(test_classes) - set(classes)):
        raise ValueError(f"spec='folder:{directory}': val has the class {unknown[0]!r}, which train lacks")
    number = {name: i for i, name in enumerate(classes)}
    common = dict(number=number, batch_size=batch_size, image_size=image_size, workers=workers, **options)
    return Data(
        name="folder",
        train=FolderLoader(train_files, augment=augment, train=True, **common),
        train_eval=FolderLoader(train_files, **common),
        test=FolderLoader(test_files, **common),
        num_classes=len(classes),
        in_channels=3,
        image_size=image_size,
        train_size=len(train_files),
        test_size=len(test_files),
    )


def _scan(directory):
    """Sorted class names and image files of DIR/<class>/*."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is missing; expected DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg"
        )
    found = images_by_class(directory)
    return list(found), [file for files in found.values() for file in files]


class FolderLoader(Loader):
    """Loader over image files; an image's crop depends on (seed, epoch, its position in the epoch) alone."""

    def __init__(
        self, files, number, batch_size, *, image_size, workers, augment=False, device="cpu", **options
    ):
        super().__init__(len(files), batch_size, **options)
        self.device = device
        mean_std = (255 * torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
        self.mean, self.std = (t.to(device) for t in mean_std)
        self.images, self.processes = Images(files, number, image_size, augment, self.seed), workers
        self._start()

    def _start(self):
        self.workers = torch.utils.data.DataLoader(
            self.images,
            # Without a cycle workers stop with the last reference; the cyclic collector takes 5 s for each.
            batch_sampler=Keys(weakref.proxy(self)),
            num_workers=self.processes,
            persistent_workers=self.processes > 0,
            generator=torch.Generator(),  # so that iterating leaves the global random state alone
            pin_memory=torch.device(self.device).type == "cuda",
        )

    def __iter__(self):
        for x, target in self.workers:
            x, target = x.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
            yield x.float().sub_(self.mean).div_(self.std), target


class Keys:
    """Batches of (epoch, position in the epoch, file index): all that a worker needs to know."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader) - self.loader.start_batch

    def __iter__(self):
        loader = self.loader
        order = loader._order(loader._generator()).tolist()
        for part in loader._slices():
            # Rank r's k-th image is number k * world_size + r of the epoch, so no two ranks share a crop.
            positions = range(part.start, part.stop)
            yield [(loader.epoch, k * loader.world_size + loader.rank, order[k]) for k in positions]


class Images(torch.utils.data.Dataset):
    """(uint8 image of shape (3, size, size), class number) of a key from `Keys`."""

    def __init__(self, files, number, size, augment, seed):
        self.files = [str(file) for file in files]
        self.targets = [number[file.parent.name] for file in files]
        self.size, self.augment, self.seed = size, augment, seed

    def __getitem__(self, key):
        from PIL import Image

        epoch, position, index = key
        try:
            with Image.open(self.files[index]) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{self.files[index]}: not a readable image ({error})") from error
        flip = False
        if self.augment:
            rng = np.random.default_rng((self.seed, epoch, position))
            box, flip = random_box(image.width, image.height, rng), rng.random() < 0.5
        else:
            box = centre_box(image.width, image.height)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        pixels = pixels[:, ::-1] if flip else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), self.targets[index]


def random_box(width, height, rng):
    """(left, top, right, bottom) of 8 to 100 % of the area, aspect ratio 3/4 to 4/3 (Szegedy 2015)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return centre_box(width, height)


def centre_box(width, height):
    """The central square of 7/8 of the shorter side: what resizing to 256 and cropping to 224 keeps."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
