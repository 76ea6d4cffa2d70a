"""Data sets by name, and loaders whose batches are a pure function of (seed, epoch, batch)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FORMS = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, fake[:CxHxW[:CLASSES]]"


class Loader:
    """Batches (x, target) of one rank: x float32 (N, C, H, W), normalised; target int64 (N,).

    A training loader (``train``) draws a new order and new augmentation each epoch, and drops an incomplete
    last batch unless it is the only one. Otherwise the order is that of the data set and every image appears
    once. Rank r of w takes positions r, r + w, ...; when training, all ranks have equally many.
    ``batch_size`` counts one rank's images. Iterating changes nothing: until the next `set_epoch` the same
    batches come again.
    """

    def __init__(self, size, batch_size, *, train=False, seed=0, rank=0, world_size=1):
        self.batch_size, self.train, self.seed = batch_size, train, seed
        self.size, self.rank, self.world_size = size, rank, world_size
        if size < world_size:
            raise ValueError(f"world_size={world_size}: more ranks than the {size} images of the data set")
        self.samples = size // world_size if train else len(range(rank, size, world_size))
        self.only = None  # of a sample: the indices of its images
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Select the epoch, and the batch with which iteration starts; ValueError outside 0..len(loader)."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: expected at least 0")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch}: expected 0 to {len(self)}, the batches of an epoch")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever the start."""
        if self.train and self.samples >= self.batch_size:
            return self.samples // self.batch_size
        return -(-self.samples // self.batch_size)

    def sample(self, batches: int, seed: int = 0) -> "Loader":
        """A loader of ``batches`` batches of random images of this one, in its order; itself where it has no more.

        For measurements by one process: the first images of a folder are those of its first classes. A training loader,
        whose images come in random order already, and one of several processes give themselves.
        """
        count = batches * self.batch_size
        if self.train or self.world_size > 1 or count >= self.samples:
            return self
        made = copy.copy(self)
        drawn = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))[:count]
        made.only, made.samples = drawn.sort().values, count
        made.set_epoch(0)
        made._start()
        return made

    def _start(self):
        """What a loader needs beside its settings."""

    def _generator(self):
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def _order(self, generator):
        """Data set indices of this rank, in the order of the epoch."""
        if self.only is not None:
            return self.only
        order = torch.randperm(self.size, generator=generator) if self.train else torch.arange(self.size)
        return self._share(order)

    def _share(self, values):
        """This rank's part of what the whole epoch has one of per position, along the last axis."""
        return values[..., self.rank :: self.world_size][..., : self.samples]

    def _slices(self):
        for batch in range(self.start_batch, len(self)):
            yield slice(batch * self.batch_size, min((batch + 1) * self.batch_size, self.samples))


@dataclass
class Data:
    """A data set: its loaders and what a model must know about it."""

    name: str
    train: Loader  # shuffled and augmented
    train_eval: Loader  # the training images in order, as they are: for measurements
    test: Loader
    num_classes: int
    in_channels: int
    image_size: int
    train_size: int
    test_size: int


def crop_flip(images, dy, dx, flip, pad):
    """Shift each image by up to ``pad`` pixels with zeros moving in, and mirror some.

    out[n, c, i, j] = padded[n, c, dy[n] + i, dx[n] + j], with W - 1 - j for j where flip[n]; padded has
    ``pad`` zeros on every side. images: (N, C, H, W), any dtype; dy, dx: int64 (N,) in 0..2*pad; flip: bool
    (N,).
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad)).reshape(n, channels, -1)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + dx[:, None]
    pixels = (rows + dy[:, None])[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    return padded.gather(2, pixels.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)


class TensorLoader(Loader):
    """Loader over uint8 images in memory; ``mean`` and ``std`` per channel, in units of the stored bytes."""

    def __init__(self, images, targets, mean, std, batch_size, *, pad=0, flip=False, device="cpu", **options):
        super().__init__(len(images), batch_size, **options)
        self.images, self.targets = images.to(device), targets.to(device)
        self.mean, self.std = (
            torch.as_tensor(t, dtype=torch.float32, device=device).view(-1, 1, 1) for t in (mean, std)
        )
        self.pad, self.flip, self.device = pad, flip, device

    def __iter__(self):
        generator = self._generator()
        order = self._order(generator).to(self.device)
        # Drawn on the CPU for the whole epoch: the same on every device, for every start and number of ranks.
        shifts = torch.randint(0, 2 * self.pad + 1, (2, self.size), generator=generator)
        mirrored = torch.rand(self.size, generator=generator) < (0.5 if self.flip else 0.0)
        dy, dx = self._share(shifts).to(self.device)
        mirrored = self._share(mirrored).to(self.device)
        for part in self._slices():
            x = self.images[order[part]]
            if self.train and (self.pad or self.flip):
                x = crop_flip(x, dy[part], dx[part], mirrored[part], self.pad)
            yield x.float().sub_(self.mean).div_(self.std), self.targets[order[part]]


def build_data(
    spec,
    batch_size,
    seed=0,
    augment=True,
    *,
    image_size=224,
    workers=4,
    device="cpu",
    rank=0,
    world_size=1,
):
    """Data set ``spec`` as a `Data`.

    ``digits``: scikit-learn's 8x8 digits, 1437 to train and 360 to test with, always the same ones; augmented
    by shifts of up to one pixel. ``cifar10:DIR``, ``cifar100:DIR``: the binary files, in DIR or the usual
    folder in it; random crop with 4 pixels of padding, mirroring. ``folder:DIR``: DIR/train/<class>/*.jpg and
    DIR/val, read by ``workers`` processes; random resized crop to ``image_size`` and mirroring, or resize and
    centre crop. ``fake:CxHxW:CLASSES``: 512 and 128 synthetic, learnable images (default 3x32x32:10).
    Batches lie on ``device``. ValueError: unknown spec, bad argument, damaged file. FileNotFoundError: missing file.
    ImportError: missing extra.
    """
    for argument, value, least in [
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("world_size", world_size, 1),
    ]:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{argument}={value!r}: expected an integer of at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}, below world_size")
    name, _, rest = spec.partition(":")
    options = {"seed": seed, "device": device, "rank": rank, "world_size": world_size}
    if name == "folder":
        from qkernels.training.folder import folder_data

        return folder_data(_directory(name, rest), batch_size, augment, image_size, workers, options)
    if spec == "digits":
        arrays, augmentation = _digits(), {"pad": 1}
    elif name in _CIFAR:
        arrays, augmentation = _cifar(name, _directory(name, rest)), {"pad": 4, "flip": True}
    elif name == "fake":
        arrays, augmentation = _fake(spec, rest), {"pad": 4, "flip": True}
    else:
        raise ValueError(f"spec={spec!r}: unknown data set; expected {_FORMS}")
    train, test, mean, std, num_classes = arrays
    train = [tensor.to(device) for tensor in train]  # once, for both loaders
    common = dict(mean=mean, std=std, batch_size=batch_size, **options)
    return Data(
        name=name,
        train=TensorLoader(*train, train=True, **(augmentation if augment else {}), **common),
        train_eval=TensorLoader(*train, **common),
        test=TensorLoader(*test, **common),
        num_classes=num_classes,
        in_channels=train[0].shape[1],
        image_size=train[0].shape[2],
        train_size=len(train[0]),
        test_size=len(test[0]),
    )


def _directory(name, rest):
    if not rest:
        raise ValueError(f"spec={name!r}: the data set lies in a folder; expected {name}:DIR")
    directory = Path(rest).expanduser()
    if not directory.is_dir():
        raise FileNotFoundError(f"spec='{name}:{directory}': {directory} is not a folder")
    return directory


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("spec='digits': needs scikit-learn (pip install qkernels[train])") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    targets = torch.from_numpy(digits.target.astype(np.int64))
    # Every fifth image of the list sorted by class is for testing: stratified, and the same for ever.
    by_class = torch.sort(targets, stable=True).indices
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[by_class[::5]] = True
    train, test = (images[~held_out], targets[~held_out]), (images[held_out], targets[held_out])
    # Bytes 0..16 stand for 0..1; standardising makes the unit irrelevant.
    pixels = train[0].double()
    return train, test, [pixels.mean()], [pixels.std()], 10


# Label bytes of a record (the last one counts), classes, folder, training files, test file, mean, std.
_CIFAR = {
    "cifar10": (
        1,
        10,
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": (
        2,
        100,
        "cifar-100-binary",
        ["train.bin"],
        "test.bin",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


def _cifar(name, directory):
    labels, num_classes, folder, train_files, test_file, mean, std = _CIFAR[name]
    if (directory / folder).is_dir():
        directory = directory / folder
    for file in [*train_files, test_file]:
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"spec='{name}:{directory}': {file} is missing; expected the binary version of the data set, "
                f"{', '.join([*train_files, test_file])}, in this folder or in {folder} inside it"
            )
    parts = [_records(directory / file, labels, num_classes) for file in [*train_files, test_file]]
    train = tuple(torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    mean, std = (255 * torch.tensor(t) for t in (mean, std))
    return train, parts[-1], mean, std, num_classes


def _records(path, labels, num_classes):
    """Images and targets of one binary file."""
    record, data = labels + 3072, np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % record:
        raise ValueError(
            f"{path}: {len(data)} bytes is no multiple of the record's {record}; the file is truncated"
        )
    data = torch.from_numpy(data.reshape(-1, record))
    targets = data[:, labels - 1].long()
    if targets.max() >= num_classes:
        raise ValueError(f"{path}: label {int(targets.max())} found; expected 0 to {num_classes - 1}")
    return data[:, labels:].reshape(-1, 3, 32, 32).contiguous(), targets


def _fake(spec, rest):
    """One smooth random pattern per class, under noise as strong as the pattern."""
    shape, _, classes = (rest or "3x32x32").partition(":")
    try:
        channels, height, width = map(int, shape.split("x"))
        num_classes = int(classes or 10)
    except ValueError:
        channels = height = width = num_classes = 0
    if min(channels, height, num_classes) < 1 or height != width:
        raise ValueError(f"spec={spec!r}: expected fake:CxHxW:CLASSES with H = W, such as fake:3x32x32:10")
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(num_classes, channels, 3, 3, generator=generator)
    patterns = F.interpolate(patterns, (height, width), mode="bilinear")
    sets = []
    for size in (512, 128):
        targets = torch.arange(size) % num_classes
        noise = torch.randn(size, channels, height, width, generator=generator)
        images = (128 + 32 * (patterns[targets] + noise)).clamp(0, 255).to(torch.uint8)
        sets.append((images, targets))
    return *sets, [128.0] * channels, [45.0] * channels, num_classes
