"""Data sets and loaders: good and damaged files, exact augmentation, batches that a seed determines."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loading import batches, same

from qkernels.training.data import Loader, TensorLoader, build_data, crop_flip


def write_cifar(folder, labels=1, per_file=8, classes=10):
    """Tiny files of the binary layout; returns the records, training files first."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    if labels == 2:
        names = ["train.bin", "test.bin"]
    rng, records = np.random.default_rng(0), []
    for name in names:
        data = rng.integers(0, 256, (per_file, labels + 3072), np.uint8)
        data[:, :labels] = rng.integers(0, classes, (per_file, labels))
        data.tofile(folder / name)
        records.append(data)
    return records


def memory_loader(size=23, batch_size=5, **options):
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(size, 2, 6, 6).contiguous()
    return TensorLoader(images, torch.arange(size), [0.0, 0.0], [1.0, 1.0], batch_size, **options)


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (1, 1, 5, 7), (6, 2, 7, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_crop_flip_equals_one_image_at_a_time(pad, shape, dtype, memory_format):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, shape, generator=g).to(dtype).contiguous(memory_format=memory_format)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, shape[0]), generator=g)
    flip = torch.rand(shape[0], generator=g) < 0.5
    before = images.clone()
    out = crop_flip(images, dy, dx, flip, pad)
    assert torch.equal(images, before) and out.dtype == dtype
    for i, image in enumerate(images):
        one = F.pad(image, (pad,) * 4)[:, dy[i] : dy[i] + shape[2], dx[i] : dx[i] + shape[3]]
        assert torch.equal(out[i], one.flip(-1) if flip[i] else one)


def test_crop_reaches_every_corner():
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2, 1, 3, 3)
    out = crop_flip(images, torch.tensor([0, 2]), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.bool), 1)
    assert out[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert out[1, 0].tolist() == [[5, 6, 0], [8, 9, 0], [0, 0, 0]]


def test_augmentation_of_a_training_epoch_varies_between_images_and_epochs():
    loader = memory_loader(200, 200, train=True, pad=2, flip=True)
    (x, target), (again, order) = batches(loader, 0)[0], batches(loader, 1)[0]
    shifted = (x[:, 0] == 0).any(-1).any(-1)
    assert 0.8 < shifted.float().mean() < 1.0, "24 of 25 shifts move zeros in"
    by_image = [t[:, 0][o.argsort()] != 0 for t, o in ((x, target), (again, order))]
    assert not torch.equal(*by_image)


def test_half_the_images_are_mirrored():
    images = torch.zeros(400, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 1
    loader = TensorLoader(images, torch.zeros(400), [0.0], [1.0], 400, train=True, flip=True)
    ((x, _),) = loader
    assert torch.equal(x[..., 0] + x[..., 3], torch.ones(400, 1, 4))
    assert 0.4 < x[:, 0, 0, 3].mean() < 0.6


def test_batches_are_a_function_of_seed_and_epoch():
    first = memory_loader(train=True, pad=1, flip=True, seed=3)
    second = memory_loader(train=True, pad=1, flip=True, seed=3)
    batches(second, 7)
    torch.manual_seed(99)
    assert same(batches(first, 2), batches(second, 2))
    assert same(batches(first, 2), batches(first, 2))
    assert not same(batches(first, 2), batches(first, 3))
    assert not same(batches(first, 2), batches(memory_loader(train=True, pad=1, flip=True, seed=4), 2))


def test_seed_and_epoch_are_not_interchangeable():
    a, b = memory_loader(train=True, seed=1), memory_loader(train=True, seed=2)
    assert not same(batches(a, 2), batches(b, 1))


def test_iterating_leaves_the_global_random_state_alone():
    loader, before = memory_loader(train=True, pad=1, flip=True), torch.get_rng_state()
    batches(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train", [True, False])
def test_start_batch_continues_the_same_epoch(train):
    loader = memory_loader(train=train, pad=1, flip=True)
    whole = batches(loader, 5)
    for start in range(len(whole) + 1):
        assert same(batches(loader, 5, start), whole[start:])
        assert len(loader) == len(whole)


def test_a_training_epoch_drops_only_the_incomplete_batch():
    loader = memory_loader(23, 5, train=True)
    targets = torch.cat([target for _, target in batches(loader)])
    assert len(loader) == 4 and len(targets) == 20 and len(targets.unique()) == 20
    assert not torch.equal(targets, targets.sort().values)
    assert [len(x) for x, _ in batches(memory_loader(3, 5, train=True))] == [3]


def test_evaluation_takes_every_image_once_in_order():
    loader = memory_loader(23, 5)
    targets = torch.cat([target for _, target in batches(loader, 4)])
    assert len(loader) == 5 and torch.equal(targets, torch.arange(23))


def test_images_stay_with_their_targets():
    for x, target in memory_loader(train=True):
        assert torch.equal(x[:, 0, 0, 0], target.float())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_epoch_of_a_single_process(train, world_size):
    options = {"train": train, "pad": 1, "flip": True}
    ((x, target),) = batches(memory_loader(23, 23, **options), 1)
    parts = []
    for rank in range(world_size):
        loader = memory_loader(23, 23, rank=rank, world_size=world_size, **options)
        parts.append([torch.cat(tensors) for tensors in zip(*batches(loader, 1))])
        n = len(parts[-1][0])
        assert torch.equal(parts[-1][0], x[rank::world_size][:n])
        assert torch.equal(parts[-1][1], target[rank::world_size][:n])
    sizes = [len(part[0]) for part in parts]
    assert sum(sizes) == (23 // world_size * world_size if train else 23)
    assert max(sizes) - min(sizes) <= (0 if train else 1)


def test_pixels_are_normalised_per_channel():
    images = torch.tensor([10, 20], dtype=torch.uint8).view(1, 2, 1, 1)
    ((x, _),) = TensorLoader(images, torch.zeros(1), [4.0, 10.0], [2.0, 5.0], 1)
    assert x.flatten().tolist() == [3.0, 2.0] and x.dtype == torch.float32


@pytest.mark.parametrize(
    "epoch, start, message",
    [
        (-1, 0, "epoch=-1: expected at least 0"),
        (0, -1, "start_batch=-1: expected 0 to 5, the batches of an epoch"),
        (0, 6, "start_batch=6: expected 0 to 5"),
    ],
)
def test_bad_epoch_is_named_and_changes_nothing(epoch, start, message):
    loader = memory_loader()
    loader.set_epoch(2, 1)
    with pytest.raises(ValueError, match=message):
        loader.set_epoch(epoch, start)
    assert (loader.epoch, loader.start_batch) == (2, 1)


def test_more_ranks_than_images_is_an_error():
    with pytest.raises(ValueError, match="world_size=4: more ranks than the 3 images of the data set"):
        Loader(3, 1, world_size=4)


def test_digits():
    pytest.importorskip("sklearn")
    data = build_data("digits", 64, seed=1)
    assert (data.train_size, data.test_size, data.num_classes) == (1437, 360, 10)
    assert (data.in_channels, data.image_size, data.name) == (1, 8, "digits")
    x = torch.cat([x for x, _ in data.train_eval])
    assert x.shape == (1437, 1, 8, 8) and abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5
    counts = torch.cat([target for _, target in data.test]).bincount(minlength=10)
    assert counts.min() >= 35 and counts.max() <= 37
    assert same(batches(data.test), batches(build_data("digits", 64, seed=2).test))
    train = {row.numpy().tobytes() for row in x}
    assert sum(row.numpy().tobytes() in train for row in torch.cat([x for x, _ in data.test])) == 0


def test_digits_shift_by_at_most_one_pixel_and_never_mirror():
    pytest.importorskip("sklearn")
    data = build_data("digits", 1437)
    ((x, _),), ((plain, _),) = data.train, batches(build_data("digits", 1437, augment=False).train)
    padded = F.pad(plain, (1,) * 4, value=plain.min().item())
    windows = torch.stack([padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    matches = (windows == x).flatten(2).all(-1)
    assert matches.any(0).all() and (matches.sum(1) > 100).all()


def test_digits_without_scikit_learn(missing):
    missing("sklearn")
    with pytest.raises(
        ImportError, match=r"spec='digits': needs scikit-learn \(pip install qkernels\[train\]\)"
    ):
        build_data("digits", 8)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_reads_the_binary_files(tmp_path, inside):
    records = write_cifar(tmp_path / inside)
    data = build_data(f"cifar10:{tmp_path}", 8)
    assert (data.train_size, data.test_size, data.num_classes) == (40, 8, 10)
    assert (data.in_channels, data.image_size, data.name) == (3, 32, "cifar10")
    for loader, expected in [(data.train_eval, np.concatenate(records[:5])), (data.test, records[5])]:
        x, target = (torch.cat(tensors) for tensors in zip(*loader))
        assert target.tolist() == expected[:, 0].tolist() and target.dtype == torch.int64
        pixels = torch.tensor(expected[:, 1:].reshape(-1, 3, 32, 32)).double() / 255
        mean, std = (
            torch.tensor(t).view(3, 1, 1) for t in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
        )
        torch.testing.assert_close(x.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)


def test_cifar100_takes_the_fine_label(tmp_path):
    records = write_cifar(tmp_path / "cifar-100-binary", labels=2, classes=100)
    data = build_data(f"cifar100:{tmp_path}", 4)
    assert (data.train_size, data.test_size, data.num_classes) == (8, 8, 100)
    targets = torch.cat([target for _, target in data.test])
    assert targets.tolist() == records[1][:, 1].tolist()


def test_cifar_is_augmented_only_for_training_and_only_on_request(tmp_path):
    write_cifar(tmp_path)
    data, plain = (build_data(f"cifar10:{tmp_path}", 40, augment=a) for a in (True, False))
    ((x, target),), ((unchanged, same_target),) = data.train, plain.train
    assert torch.equal(target, same_target) and not torch.equal(x, unchanged)
    assert same(batches(data.test), batches(plain.test))
    assert {row.numpy().tobytes() for row in unchanged} == {
        row.numpy().tobytes() for row in next(iter(data.train_eval))[0]
    }


def test_missing_cifar_file_is_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin is missing; expected the binary version"):
        build_data(f"cifar10:{tmp_path}", 8)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        build_data(f"cifar100:{tmp_path}/nowhere", 8)
    with pytest.raises(
        ValueError, match="spec='cifar10': the data set lies in a folder; expected cifar10:DIR"
    ):
        build_data("cifar10", 8)


@pytest.mark.parametrize("size", [0, 3072, 3073 * 2 - 1])
def test_truncated_cifar_file_is_named(tmp_path, size):
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"test_batch.bin: {size} bytes is no multiple of the record's 3073"):
        build_data(f"cifar10:{tmp_path}", 8)


def test_impossible_label_is_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes([17]) + bytes(3072))
    with pytest.raises(ValueError, match="data_batch_2.bin: label 17 found; expected 0 to 9"):
        build_data(f"cifar10:{tmp_path}", 8)


def test_fake_has_the_shape_asked_for_and_can_be_learnt():
    data = build_data("fake:1x8x8:4", 64, augment=False)
    assert (data.in_channels, data.image_size, data.num_classes, data.name) == (1, 8, 4, "fake")
    x, y = (torch.cat(tensors) for tensors in zip(*data.train_eval))
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    x, y = (torch.cat(tensors) for tensors in zip(*data.test))
    nearest = (x[:, None] - means).square().flatten(2).sum(-1).argmin(1)
    assert (nearest == y).float().mean() > 0.9 and 0.5 < x.std() < 2
    assert build_data("fake", 64).image_size == 32 and build_data("fake", 64).num_classes == 10
    assert same(batches(data.test), batches(build_data("fake:1x8x8:4", 64, seed=5).test))


@pytest.mark.parametrize(
    "spec", ["fake:3x32", "fake:3x32x16:10", "fake:3x32x32:0", "fake:axbxc", "fake:3x32x32:x"]
)
def test_bad_fake_shape_is_named(spec):
    with pytest.raises(ValueError, match=f"spec='{spec}': expected fake:CxHxW:CLASSES with H = W"):
        build_data(spec, 8)


@pytest.mark.parametrize("spec", ["mnist", "", "digits:here", "CIFAR10:/data"])
def test_unknown_spec_lists_the_forms(spec):
    with pytest.raises(ValueError, match=f"spec='{spec}': unknown data set; expected digits, cifar10:DIR"):
        build_data(spec, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected an integer"),
        ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
        ({"world_size": 0}, "world_size=0: expected an integer of at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2: expected 0 to 1, below world_size"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_data("fake", **({"batch_size": 8} | arguments))
