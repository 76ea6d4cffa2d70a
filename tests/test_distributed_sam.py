"""SAM and SAQ on two processes: DDP with both kinds of perturbation, and FSDP2's sharded parameters."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk

WORLD, STEPS = 2, 6


def network(quantize):
    torch.manual_seed(0)
    # LayerNorm instead of BatchNorm: a batch's halves then give the batch's gradients.
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    if quantize:
        qk.quantize_(net, qk.QConfig(weight_bits=3, act_bits=None, first_last_bits=None, weight_axis=None))
        with torch.no_grad():
            net.train()(torch.randn(4, 6, dtype=torch.float64))
        net.double()
    return net


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=g, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def optimizer_of(name, net, **settings):
    base = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    if name == "sam":
        return qk.optim.SAM(net, base, rho=0.1, max_norm=5.0, **settings)
    if name == "looksam":
        return qk.optim.SAM(net, base, rho=0.1, every=3, **settings)
    return qk.optim.SAQ(net, base, rho=0.2, case=int(name[-1]), every=2, **settings)


def train(net, optimizer, part, parts):
    passes = 0
    for step in range(STEPS):
        x, y = (t.chunk(parts)[part] for t in batch(step))

        def closure(x=x, y=y):
            nonlocal passes
            passes += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return passes


def parameters(net):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def alone(name):
    net = network(name.startswith("saq"))
    return train(net, optimizer_of(name, net), 0, 1), parameters(net)


def m_sharpness():
    """SAM where each half of the batch perturbs by its own gradient, and g_s is the mean; LookSAM of it with g."""
    net, halves = network(False), []
    base = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step)
        halves = []
        for a, b in zip(x.chunk(WORLD), y.chunk(WORLD)):
            base.zero_grad()
            F.cross_entropy(net(a), b).backward()
            norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
            e = [0.1 * p.grad / norm for p in net.parameters()]
            g = [p.grad.clone() for p in net.parameters()]
            kept = [p.detach().clone() for p in net.parameters()]
            for p, d in zip(net.parameters(), e):
                p.data.add_(d)
            base.zero_grad()
            F.cross_entropy(net(a), b).backward()
            for p, w in zip(net.parameters(), kept):
                p.data.copy_(w)
            halves.append([p.grad + v for p, v in zip(net.parameters(), g)])
        for p, *parts in zip(net.parameters(), *halves):
            p.grad = sum(parts) / WORLD
        base.step()
    return parameters(net)


def wrapped(kind, name):
    """(module to run, its optimizer) in this process."""
    net = network(name.startswith("saq"))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
        return model, optimizer_of(name, model, sync_perturbation=True)
    if kind == "buckets":
        model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        base = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        return model, qk.optim.SAM(model, base, rho=0.1, vanilla_loss=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, optimizer_of(name, net)


CASES = [
    ("ddp", "looksam"), ("ddp", "saq3"), ("buckets", "sam"),
    ("fsdp", "sam"), ("fsdp", "looksam"), ("fsdp", "saq1"), ("fsdp", "saq3"),
]  # fmt: skip


def check(kind, name, rank):
    model, optimizer = wrapped(kind, name)
    passes = train(model, optimizer, rank, WORLD)
    mine = parameters(model)
    everyone = [torch.empty_like(mine) for _ in range(WORLD)]
    torch.distributed.all_gather(everyone, mine)
    assert torch.equal(*everyone), "the processes' parameters differ"
    if kind == "buckets":
        expected = m_sharpness()
    else:
        count, expected = alone(name)
        assert passes == count, f"{passes} passes, one process makes {count}"
    assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-8), float((mine - expected).abs().max())


def refuse_shards():
    """What needs whole weights says so, on every process; starting step sizes in a forward would be lost."""
    model, _ = wrapped("fsdp", "saq3")
    x, calls = torch.randn(4, 6).double(), [qk.summary, qk.convert_, lambda m: qk.calibrate(m, [x])]
    calls += [lambda m: qk.perturbed(m, std=0.1).__enter__()]
    calls += [lambda m: qk.sharpness.hessian(m, [(x, torch.zeros(4).long())])]
    for call in calls:
        with pytest.raises(ValueError, match="needs whole parameters, got a model of shards"):
            call(model)
    for quantizer in qk.convert.quantizers(model):
        quantizer.state.zero_()
        quantizer.started = False
    with pytest.raises(RuntimeError, match="call qk.calibrate.* before fully_shard"):
        model(x)


def process(rank, port):
    """Every case in one pair of processes: starting one takes longer than all of them. Prints a line per case."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    refuse_shards()
    for kind, name in CASES:
        try:
            check(kind, name, rank)
            print(f"case {kind} {name}: passed", flush=True)
        except AssertionError as error:
            print(f"case {kind} {name}: {error}", flush=True)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outputs():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = str(Path(qk.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(WORLD)
    ]
    try:
        return [p.communicate(timeout=100)[0] for p in running]
    finally:
        for p in running:
            p.kill()


@pytest.mark.parametrize("kind, name", CASES)
def test_two_processes_train_as_one(outputs, kind, name):
    for output in outputs:
        assert f"case {kind} {name}: passed" in output, output


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]))
