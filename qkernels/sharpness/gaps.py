"""Generalization of a trained run: train, test and corrupted test data, and what its layers look like."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..annotations import Progress, StrPath
from ..corruptions import CORRUPTIONS, SEVERITIES, ImageNetC, corrupt, load_cifar_c
from ..nn import QUANTIZED, _Quantized
from ..quantizers import Quantizer
from ..training.data import Data
from ..training.engine import evaluate

_LAYERS: tuple[Any, ...] = (_Quantized, *QUANTIZED)


def generalization(model: nn.Module, data: Data, corruptions: Iterable[str] = (),
                   severities: Sequence[int] = SEVERITIES, *, published: StrPath | None = None, seed: int = 0,
                   done: dict[str, Any] | None = None,
                   progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """Loss and accuracy on training, test and corrupted test images, and the gaps between them.

    gap: test loss - training loss; accuracy_gap: training accuracy - test accuracy; per corruption,
    severity, and for their means, the same against the training data.

    Args:
        model: nn.Module, evaluated on its own device. data: of ``qkernels.training.load_run`` (train_eval,
        test).
        corruptions: names of ``qkernels.corruptions``, or "all". severities: 1 to 5.
        published: folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C to read them from; default they are computed.
        done: results of an earlier call, ``corrupted`` of which are not computed again; it is updated as
        results come.
        progress: called with (what, done, of).

    Returns: {"train_loss", "train_acc", "test_loss", "test_acc", "gap", "accuracy_gap", "corrupted":
        {"name": {"1": {...}}}, "mean": {"1": {...}, "all": {...}}}, JSON-ready.
    Raises: ValueError (unknown corruption or severity, images too small). Source: QGen, tables 1, 4 to 6;
        Hendrycks & Dietterich 2019.
    """
    names = CORRUPTIONS if corruptions == "all" else tuple(corruptions)
    unknown = [n for n in names if n not in CORRUPTIONS]
    if unknown:
        raise ValueError(f"corruptions must be 'all' or among {', '.join(CORRUPTIONS)}; got {unknown[0]!r}")
    wrong = [s for s in severities if s not in SEVERITIES]
    if wrong:
        raise ValueError(f"severities must be among {SEVERITIES}, got {wrong[0]!r}")
    device = next(model.parameters()).device
    found, published = {} if done is None else done, published and str(published)
    if "test_loss" not in found:
        found["train_loss"], found["train_acc"] = evaluate(model, data.train_eval, device)
        found["test_loss"], found["test_acc"] = evaluate(model, data.test, device)
        found["gap"] = found["test_loss"] - found["train_loss"]
        found["accuracy_gap"] = found["train_acc"] - found["test_acc"]
    corrupted = found.setdefault("corrupted", {})
    if corrupted and names and found.get("published") != published:
        raise ValueError(
            f"published: corruptions were measured with {found.get('published')!r} before, not {published!r}"
        )
    if names:
        found["published"] = published
    for i, name in enumerate(names):
        for severity in severities:
            cells = corrupted.setdefault(name, {})
            if str(severity) not in cells:
                images = (
                    _Corrupted(data, name, severity, seed)
                    if published is None
                    else _Published(data, name, severity, published)
                )
                loss, accuracy = evaluate(model, images, device)
                cells[str(severity)] = _against(found, loss, accuracy)
        if progress is not None:
            progress("corruptions", i + 1, len(names))
    if names:
        wanted = [str(s) for s in severities]
        groups = {**{s: [s] for s in wanted}, "all": wanted}
        found["mean"] = {}
        for key, group in groups.items():
            cells = [corrupted[n][s] for n in names for s in group]
            loss, accuracy = (sum(c[k] for c in cells) / len(cells) for k in ("loss", "acc"))
            found["mean"][key] = _against(found, loss, accuracy)
    return found


def _against(found, loss, accuracy):
    return {
        "loss": loss,
        "acc": accuracy,
        "gap": loss - found["train_loss"],
        "accuracy_gap": found["train_acc"] - accuracy,
    }


class _Corrupted:
    """The test loader with one corruption, applied to the pixels before normalisation."""

    def __init__(self, data, name, severity, seed):
        self.loader, self.arguments, self.seed = data.test, (name, severity), seed
        # The digits' bytes end at 16.
        self.peak = 16.0 if data.name == "digits" else 255.0

    def __iter__(self):
        first = 0
        for x, target in self.loader:
            mean, std = self.loader.mean / self.peak, self.loader.std / self.peak
            pixels = (x * std + mean).clamp(0, 1)
            pixels = corrupt(pixels, *self.arguments, seed=self.seed, start=first)
            yield (pixels - mean) / std, target
            first += len(x)


class _Published:
    """One corruption of a published set, as the test loader gives its images: normalised, in its batches."""

    def __init__(self, data, name, severity, folder):
        self.loader = data.test
        if data.name in ("cifar10", "cifar100"):
            self.images = torch.utils.data.TensorDataset(*load_cifar_c(folder, name, severity))
        elif data.name == "folder":
            self.images = ImageNetC(folder, name, severity)
            if len(self.images.classes) != data.num_classes:
                raise ValueError(
                    f"published: {folder} has {len(self.images.classes)} classes, the run's data {data.num_classes}"
                )
        else:
            raise ValueError(f"published: there are corrupted sets of CIFAR and ImageNet, not of {data.name}")

    def __iter__(self):
        mean, std = self.loader.mean, self.loader.std
        for x, target in torch.utils.data.DataLoader(self.images, self.loader.batch_size):
            yield (x.to(mean.device).float() - mean) / std, target.to(mean.device)


@torch.no_grad()
def layer_table(model: nn.Module) -> list[dict[str, Any]]:
    """Per layer: bits, weight norm, step sizes and quantization error. Source: QGen fig. 1, table 2; NT table 6.

    weight_step, input_step: mean step size; mean_error: mean of |Q(w) - w|, w standardised first where the
    quantizer does so (None: not quantized); weight_norm: ||w||; largest: max |w|.
    """
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        weight, activation = (getattr(layer, f"{role}_quantizer", None) for role in ("weight", "input"))
        row = {"name": name, "weight_bits": None, "weight_step": None, "mean_error": None}
        if not getattr(layer, "converted", False):
            row |= {"weight_norm": layer.weight.norm().item(), "largest": layer.weight.abs().max().item()}
        if weight is not None:
            row["weight_bits"] = weight.bits
            row["weight_step"] = _step(weight)
        if isinstance(weight, Quantizer):
            row["mean_error"] = (weight(layer.weight) - weight.prepare(layer.weight)).abs().mean().item()
        row["input_bits"] = None if activation is None else activation.bits
        row["input_step"] = None if activation is None else _step(activation)
        rows.append(row)
    return rows


def _step(quantizer):
    return quantizer.grid()["scale"].abs().mean().item()
