"""Checkpoints: tensors in safetensors, everything else in JSON, and a crash at any moment leaves a loadable one.

A checkpoint is a folder: `model.safetensors` (the state dict, readable by any tool), `state.safetensors` (every other
tensor) and `state.json` (version, sizes and checksums of both files, and the structure around the tensors).
"""

import argparse
import io
import json
import os
import pickle
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from ..files import whole

VERSION = 1
MODEL, STATE, INDEX = "model.safetensors", "state.safetensors", "state.json"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that is not whole, as a power cut may leave it; `path` is its folder."""

    def __init__(self, path, message):
        previous = previous_of(path)
        other = f"the one before it is in {previous}" if previous.exists() else "there is no previous one"
        super().__init__(f"{message}; {other}")
        self.path = path


def save(path, model, state):
    """Writes the folder `path` atomically; an existing checkpoint is kept as `path` + ".previous".

    The new folder is completed and flushed under a temporary name first; two renames then put it in place.

    Args:
        path: the folder, for example `runs/x/checkpoint`; its parent is created.
        model: a state dict, name -> tensor (other values, such as extra state, go to the JSON).
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        TypeError: `state` holds a value of another type; the message names where.
    """
    path = Path(path)
    tensors, plain = {}, {}
    for name, value in model.items():
        (tensors if isinstance(value, torch.Tensor) else plain)[name] = value
    state_tensors = {}
    encoded = {
        "model": _encode(plain, "model", state_tensors),
        "state": _encode(state, "state", state_tensors),
    }
    partial, previous = path.with_name(path.name + ".partial"), previous_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {
        name: _write_tensors(partial / name, data)
        for name, data in ((MODEL, tensors), (STATE, state_tensors))
    }
    _write(partial / INDEX, json.dumps({"version": VERSION, "files": files, **encoded}).encode())
    _flush_folder(partial)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(path, previous)
    os.replace(partial, path)
    _flush_folder(path.parent)


def load(path, device="cpu"):
    """`(model, state)` as given to `save`, with tensors on `device`.

    When `path` is missing but `path` + ".previous" is there (a crash between two renames), that one is read.

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpoint: it is truncated or damaged, or lacks a file. RuntimeError: another version wrote it.
    """
    wanted, path = path, latest(path)
    if path is None:
        raise FileNotFoundError(f"no checkpoint at {wanted}")
    try:
        index = json.loads((path / INDEX).read_text())
        version = index["version"]
    except FileNotFoundError:
        raise DamagedCheckpoint(path, f"checkpoint {path} has no {INDEX}") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(path, f"checkpoint file {path / INDEX} is truncated or damaged") from None
    if version != VERSION:
        raise RuntimeError(
            f"checkpoint {path} has version {version!r}; this qkernels reads version {VERSION}"
        )
    model, tensors = (_read_part(path, name, index["files"][name], device) for name in (MODEL, STATE))
    model.update(_decode(index["model"], tensors))
    return model, _decode(index["state"], tensors)


def load_model(path, device="cpu"):
    """The state dict alone: `path` is a file, a checkpoint folder, or a run folder that holds one.

    A file of torch.save is read with weights_only=True and holds a state dict, by itself or under "state_dict" or
    "model"; any other file is of safetensors.

    Raises:
        FileNotFoundError: none of these is there.
        RuntimeError: the file is truncated or damaged, or holds something else.
    """
    path = Path(path)
    if path.is_file():
        data = path.read_bytes()
        torch_save = data[:4] == b"PK\x03\x04" or data[:2] == b"\x80\x02"  # also named .pth.tar, .bin, ...
        pickled = path.suffix in (".pt", ".pth") or (torch_save and data[8:9] != b"{")  # safetensors' header
        return (_read_state_dict if pickled else _read_tensors)(path, data, device)
    for folder in (path, path / "checkpoint"):
        if latest(folder) is not None:
            return load(folder, device)[0]
    raise FileNotFoundError(
        f"{path} is neither a .safetensors, .pt or .pth file nor a folder with a checkpoint"
    )


def save_tensors(path, tensors):
    """Writes one safetensors file atomically."""
    with whole(path) as part:
        _write_tensors(part, tensors)


def previous_of(path):
    """Where the checkpoint before `path` is kept."""
    return path.with_name(path.name + ".previous")


def latest(path):
    """`path` if that folder is a checkpoint, else its previous one, else None."""
    path = Path(path)
    candidates = (path, previous_of(path))
    return next((folder for folder in candidates if any((folder / n).exists() for n in (INDEX, STATE))), None)


def random_state():
    """The state of every random number generator a training step may draw from: python, numpy, torch, CUDA."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = [name, keys.tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state):
    """Restores what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]][: torch.cuda.device_count()])


def _encode(value, where, tensors):
    """JSON for `value`; tensors go to `tensors`, and a marked dict {"@kind": ...} stands for what JSON lacks."""
    if isinstance(value, torch.Tensor):
        tensors[where] = value
        return {"@tensor": where, "channels_last": _channels_last(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("@") for key in value):
            return {key: _encode(item, f"{where}.{key}", tensors) for key, item in value.items()}
        return {
            "@items": [
                [_encode(k, where, tensors), _encode(v, f"{where}.{k}", tensors)] for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return {"@tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.item() if isinstance(value, np.generic) else value
    raise TypeError(
        f"{where}: a checkpoint cannot hold {type(value).__name__}; accepted are tensors, numbers, str, "
        "bool, None, and dicts, lists and tuples of them"
    )


def _decode(value, tensors):
    """The inverse of `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "@tensor" in value:
        tensor = tensors[value["@tensor"]]
        return tensor.contiguous(memory_format=torch.channels_last) if value["channels_last"] else tensor
    if "@items" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["@items"]}
    if "@tuple" in value:
        return tuple(_decode(item, tensors) for item in value["@tuple"])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _channels_last(tensor):
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install qkernels[train]") from error
    return safetensors


def _write_tensors(path, tensors):
    """Writes and flushes; copies are made because safetensors refuses tensors that share memory."""
    packed = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return _write(path, _safetensors().torch.save(packed))


def _write(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _read_part(folder, name, expected, device):
    path = folder / name
    if not path.exists():
        raise DamagedCheckpoint(folder, f"checkpoint file {path} is missing")
    data = path.read_bytes()
    if expected != {"bytes": len(data), "crc32": zlib.crc32(data)}:
        facts = f"{len(data)} bytes, {expected['bytes']} were written"
        raise DamagedCheckpoint(folder, f"checkpoint file {path} is truncated or damaged: {facts}")
    return _read_tensors(path, data, device)


def _read_tensors(path, data, device):
    safetensors = _safetensors()
    try:
        return {name: tensor.to(device) for name, tensor in safetensors.torch.load(data).items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise RuntimeError(f"{path} is not a whole safetensors file: {error}") from None


def _read_state_dict(path, data, device):
    try:
        # timm and DeiT keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"{path} is not a whole file of torch.save with tensors alone: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(item, torch.Tensor) for item in value.values()):
        raise RuntimeError(
            f"{path} holds no state dict: expected names and tensors, by themselves or under "
            "'state_dict' or 'model'"
        )
    return value


def _flush_folder(path):
    """Makes renames inside `path` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
