"""A small network, its quantized form with a plain twin, and how to train them."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk


def network(dtype=torch.float32, seed=0, norm=True):
    torch.manual_seed(seed)
    layers = [nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).to(dtype)


def batches(count, dtype=torch.float32, size=16):
    g = torch.Generator().manual_seed(1)
    draw = [torch.randn(size, 6, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]
    return [(x, (x[:, :3].argmax(1))) for x in draw]


def base_of(name, params, factor=1.0):
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.01 * factor, weight_decay=0.01)
    return torch.optim.SGD(params, lr=0.1 * factor, momentum=0.9, weight_decay=1e-3)


def closure_of(net, optimizer, x, y, count=None):
    def closure():
        if count is not None:
            count.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def train(net, optimizer, data):
    """Steps with a closure; the number of passes."""
    count = []
    for x, y in data:
        optimizer.step(closure_of(net, optimizer, x, y, count))
    return len(count)


def close(a, b, tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.allclose(
            p.double(), q.double(), rtol=tolerance, atol=tolerance * float(q.double().abs().max())
        ), name


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


class PlainLayer(nn.Module):
    """LSQ on the weight, from torch's own operations: the gradients are autograd's."""

    def __init__(self, layer, scale, bits):
        super().__init__()
        self.weight, self.bias, self.scale = (
            nn.Parameter(t.detach().clone()) for t in (layer.weight, layer.bias, scale)
        )
        self.bound, self.e, self.q = 2 ** (bits - 1), None, None

    def forward(self, x):
        g = (self.weight[0].numel() * (self.bound - 1)) ** -0.5
        scale = (self.scale * g + (self.scale - self.scale * g).detach()).reshape(-1, 1)
        v = (self.weight / scale).clamp(-self.bound, self.bound - 1)
        self.q = (v + (v.round() - v).detach()) * scale
        assert scale.min() > 0
        self.q.retain_grad()
        return F.linear(x, self.q if self.e is None else self.q + self.e, self.bias)


def quantized(dtype=torch.float64, bits=3, **settings):
    """The network with quantized weights, some of them clipped, and its plain twin."""
    net = network(dtype)
    qk.quantize_(
        net, qk.QConfig(method="lsq", weight_bits=bits, act_bits=None, first_last_bits=None, **settings)
    )
    net.train()
    with torch.no_grad():
        net(batches(1, dtype)[0][0])
        for m in (net[1], net[3]):
            m.weight_quantizer.to(dtype).scale.mul_(0.6)
        net[0].reset_running_stats()
    plain = nn.Sequential(copy.deepcopy(net[0]), PlainLayer(net[1], net[1].weight_quantizer.scale, bits), nn.ReLU(),
                          PlainLayer(net[3], net[3].weight_quantizer.scale, bits))  # fmt: skip
    return net, plain
