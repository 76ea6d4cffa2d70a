"""Where a run runs: its device, and the few facts of torch.distributed it needs (one process is rank 0 of 1)."""

import os

import torch
import torch.distributed as dist


def find_device(name):
    """The torch.device of `--device`; ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is not a device; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: {name!r} is not there; this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({os.cpu_count()} cores)"


def start(device):
    """Joins the process group that `torchrun` described in the environment; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        # DistributedDataParallel imports this, whose default arguments keep the group there is at that time: its
        # threads then outlive `stop`, and now and then abort the process at its end.
        from torch.distributed import nn  # noqa: F401

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    if active():
        dist.destroy_process_group()


def active():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if active() else 0


def world():
    return dist.get_world_size() if active() else 1


def sum_(tensor):
    """Sums `tensor` over the processes in place."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensors):
    """Overwrites each tensor with that of process 0."""
    if active():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value):
    """The list of every process's `value`, on every process."""
    if not active():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def barrier():
    if active():
        dist.barrier()
