"""The few facts of torch.distributed a training run needs; all of them hold without it (one process, rank 0)."""

import os

import torch
import torch.distributed as dist


def start(device):
    """Joins the process group that `torchrun` described in the environment; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    if dist.is_available() and dist.is_initialized():
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
