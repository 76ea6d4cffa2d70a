"""The eager library: what Python does without it, to the bit; and when it is not used."""

import shutil
import threading
import time
import weakref

import pytest
import torch
from stepping import closure_of
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import eager, optim, reference
from qkernels.noise import FeaturePerturbation, Pseudo, StochasticRounding, Tempering

pytestmark = pytest.mark.skipif(eager.library is None, reason=f"the eager library: {eager.why_not}")

FORMS = {
    "tensor": {},
    "axis": {"axis": 1},
    "group": {"group_size": 2},
    "offset": {"axis": 1, "offset": 0.25},
    "zero_point": {"zero_point": 3},
    "zero_points": {"axis": 1, "zero_point": torch.tensor([1, 2, 0, -1])},
    "clip_only": {"clip_only": True},
    "ewgs": {"ewgs": 0.3, "grad_scale": 0.1},
    "tempering": {"noise": Tempering(), "stream": -(2**63)},
    "perturbation": {"noise": FeaturePerturbation(p=1.0), "stream": 2**63 - 1},
    "before": {"noise": FeaturePerturbation(p=0.999, where="before"), "stream": 5},
    "stochastic": {"noise": StochasticRounding(), "stream": 7},
    "pseudo": {"noise": Pseudo(), "axis": 1, "stream": 2**53 + 1},
    "shift": {"shift": 1.5},
    "everything": {
        "axis": 1,
        "offset": 0.25,
        "grad_scale": 0.7,
        "clip_only": True,
        "noise": Pseudo(),
        "stream": 3,
    },
    "tempered": {"noise": Tempering(c=0.3, k=20.0), "zero_point": 2, "ewgs": 0.2, "grad_scale": 0.6},
}


@pytest.fixture(params=["eager", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(eager, "library", None)
    return request.param


def both(monkeypatch, run):
    with monkeypatch.context() as patch:
        found = run()
        patch.setattr(eager, "library", None)
        return found, run()


def inputs(dtype=torch.float32, form="tensor", wanted=(True, True)):
    torch.manual_seed(3)
    x = torch.randn(3, 4, 6, dtype=torch.float64).to(dtype)
    settings, compute = dict(FORMS[form]), torch.float64 if dtype == torch.float64 else torch.float32
    rows = 4 if "axis" in settings else x.numel() // 2 if "group_size" in settings else 1
    scale = torch.linspace(0.1, 0.3, rows, dtype=compute)
    if "offset" in settings:
        settings["offset"] = torch.full((rows,), settings["offset"], dtype=compute, requires_grad=True)
    if "noise" in settings:
        settings["seed"] = torch.tensor([2**63 - 5])
    if "shift" in settings:
        settings |= {
            "shift": torch.randn(x.shape).to(dtype),
            "shift_scale": torch.tensor([settings["shift"]]),
        }
    leaves = [t.requires_grad_(w) for t, w in zip((x, scale), wanted)]
    return *leaves, {"bits": 4, **settings}


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_pythons(monkeypatch, form, dtype, wanted):
    def run():
        x, scale, settings = inputs(dtype, form, wanted)
        y = qk.fake_quantize(x, scale, **settings)
        asked = [t for t in (x, scale, settings.get("offset")) if t is not None and t.requires_grad]
        with torch.no_grad():
            assert torch.equal(qk.fake_quantize(x, scale, **settings), y)
        return y, *torch.autograd.grad(y, asked, torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape))

    found, expected = both(monkeypatch, run)
    assert found[0].grad_fn.name() != expected[0].grad_fn.name()
    assert len(found) == len(expected)
    assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected))


@pytest.mark.parametrize("form", ["group", "axis", "tensor"])
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 0, 1, 2)])
def test_strides_are_pythons(monkeypatch, form, order):
    def run():
        x = (
            torch.arange(144.0)
            .view(2, 4, 3, 6)
            .permute(order)
            .contiguous()
            .permute(*torch.tensor(order).argsort())
        )
        rows = {"group": {"group_size": 2}, "axis": {"axis": 1}, "tensor": {}}[form]
        scale = torch.full(({"group": 72, "axis": 4, "tensor": 1}[form],), 0.3)
        return qk.fake_quantize(x.requires_grad_(), scale, bits=4, **rows)

    found, expected = both(monkeypatch, run)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_the_inputs_alone_are_saved(way):
    x, scale, settings = inputs(form="perturbation")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = qk.fake_quantize(x, scale, **settings)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, scale, settings["seed"]))
    y.sum().backward()


def test_an_input_that_was_changed_is_refused(way):
    x, scale, _ = inputs()
    x = x * 1
    y = qk.fake_quantize(x, scale, bits=4)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_needs_the_graph(way):
    x, scale, _ = inputs()
    y = qk.fake_quantize(x, scale, bits=4).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("form", ["tensor", "offset", "ewgs", "pseudo", "everything", "tempered"])
def test_second_derivatives_are_pythons(monkeypatch, form):
    def run():
        x, scale, settings = inputs(torch.float64, form)
        g = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).requires_grad_()
        first = torch.autograd.grad(qk.fake_quantize(x, scale, **settings), (x, scale), g, create_graph=True)
        assert all(t.requires_grad for t in first)
        return *first, *torch.autograd.grad(
            sum(t.square().sum() for t in first), (x, scale, g), allow_unused=True
        )

    found, expected = both(monkeypatch, run)
    assert [f is None for f in found] == [e is None for e in expected]
    assert all(torch.equal(f, e) for f, e in zip(found, expected) if f is not None)


def test_gradients_that_carry_a_tangent(way):
    x, scale, _ = inputs(torch.float64)
    y = qk.fake_quantize(x, scale, bits=4)
    with torch.autograd.forward_ad.dual_level():
        g = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2.0))
        dx = torch.autograd.grad(y, x, g)[0]
        primal, tangent = torch.autograd.forward_ad.unpack_dual(dx)
    assert primal.any() and torch.equal(tangent, 2 * primal)


def test_a_forced_backend_computes_also_the_backward_of_earlier_graphs(way, monkeypatch):
    x, scale, _ = inputs()
    y, called, right = qk.fake_quantize(x, scale, bits=4), [], reference.fake_quantize_backward
    monkeypatch.setattr(reference, "fake_quantize_backward", lambda *args: called.append(1) or right(*args))
    y.sum().backward(retain_graph=True)
    assert not called
    with qk.use_backend("reference"):
        y.sum().backward(retain_graph=True)
    assert len(called) == 1
    y.sum().backward()
    assert len(called) == 1


def test_checkpointing(way):
    x, scale, settings = inputs(form="tempering")
    kept = torch.autograd.grad(qk.fake_quantize(x, scale, **settings).square().sum(), (x, scale))
    again = checkpoint(lambda t: qk.fake_quantize(t, scale, **settings).square(), x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), (x, scale)), kept))


def test_compiled_autograd(way):
    x, scale, settings = inputs(form="offset")

    def gradients():
        y = qk.fake_quantize(x, scale, **settings) * x
        for t in (x, scale, settings["offset"]):
            t.grad = None
        y.sum().backward()
        return [t.grad.clone() for t in (x, scale, settings["offset"])]

    plain = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        compiled = gradients()
    assert all(map(torch.equal, plain, compiled))


def test_modes_see_the_op(way):
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, scale, _ = inputs()
    seen = []
    with Seen():
        qk.fake_quantize(x, scale, bits=4).sum().backward()
    assert {"qkernels.fake_quantize.default", "qkernels.fake_quantize_backward.default"} <= set(seen)


class Named(torch.Tensor):
    """A subclass that overrides nothing, and so keeps its type through every function of torch."""


def test_functions_of_subclasses_and_modes_are_heard(way):
    class Heard(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    x, scale, _ = inputs()
    heard = []
    assert type(qk.fake_quantize(x.detach().as_subclass(Named), scale, bits=4)) is Named
    with Heard():
        qk.fake_quantize(x, scale, bits=4)
    assert "qkernels.fake_quantize.default" in heard


def test_the_node_has_a_name():
    x, scale, _ = inputs()
    assert qk.fake_quantize(x, scale, bits=4).grad_fn.name().endswith("<qk::FakeQuantize>")


def test_what_is_no_tensor_and_no_number_is_an_error_not_a_crash():
    with pytest.raises(TypeError, match="expected 17 arguments, got 2"):
        eager.library.fake_quantize(torch.ones(1), torch.ones(1))
    x, scale, rest = torch.ones(2), torch.ones(1), [None] * 5
    numbers = [-1, -8, 7, 1.0, False, 0.0, 0, 0.0, 0.0, 0]
    assert torch.equal(eager.library.fake_quantize(x, scale, *rest, *numbers), x)
    with pytest.raises(TypeError, match="expected a tensor"):
        eager.library.fake_quantize(1.0, scale, *rest, *numbers)
    with pytest.raises(TypeError):
        eager.library.fake_quantize(x, scale, *rest, "axis", *numbers[1:])
    with pytest.raises(TypeError, match="expected a list"):
        eager.library.with_gradients((x,))
    with pytest.raises(ValueError, match="lists differ in length"):
        eager.library.set_data([x], [])
    with pytest.raises(RuntimeError, match="does not divide"):
        eager.library.fake_quantize(torch.ones(3), torch.ones(2), *rest, *numbers)


# --- lists of parameters ---


class Mixed(torch.nn.Module):
    """Parameters of several dtypes and orders, one without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(8)
        self.short = torch.nn.Parameter(torch.randn(8, 4).bfloat16())
        self.gaps = torch.nn.Parameter(torch.randn(4, 8)[:, ::2].detach())
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        y = self.norm(self.first(x)).relu().mean((2, 3))
        return (y.bfloat16() @ self.short).float() @ self.gaps


def plain():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("make", [Mixed, plain])
def test_sam_takes_the_same_steps(monkeypatch, make, adaptive, every):
    def run():
        torch.manual_seed(1)
        net = make()
        base = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        sam = optim.SAM(net, base, adaptive=adaptive, every=every)
        for _ in range(5):
            sam.step(closure_of(net, sam, torch.randn(4, 3, 6, 6), torch.arange(4)))
        return [t.clone() for t in net.state_dict().values()]

    found, expected = both(monkeypatch, run)
    assert all(map(torch.equal, found, expected))


def test_copies_that_are_written_again_have_another_version(way):
    net = torch.nn.Linear(3, 2)
    sam = optim.SAM(net, torch.optim.SGD(net.parameters(), lr=0.1))
    closure = closure_of(net, sam, torch.ones(2, 3), torch.arange(2))
    sam.step(closure)
    before = [t._version for t in sam._exchanges[0].copies]
    sam.step(closure)
    assert [t._version for t in sam._exchanges[0].copies] == [v + 1 for v in before]


def test_the_short_step_uphill_is_taken(monkeypatch):
    taken, right = [], eager.climb
    monkeypatch.setattr(eager, "climb", lambda *args: taken.append(right(*args)) or taken[-1])
    net = torch.nn.Linear(3, 2)
    sam = optim.SAM(net, torch.optim.SGD(net.parameters(), lr=0.1))

    closure = closure_of(net, sam, torch.ones(2, 3), torch.arange(2))
    sam.step(closure)  # makes the copies
    sam.step(closure)
    assert taken == [True]
    net.weight.data = net.weight.detach().clone()
    sam.step(closure)
    sam.step(closure)
    assert taken == [True, False, True]
    with qk.use_backend("reference"):
        sam.step(closure)
    assert len(taken) == 3


@pytest.mark.parametrize(
    "old, new",
    [
        (torch.randn(3, 4), torch.randn(3, 4)),
        (torch.randn(3, 4), torch.randn(20)[3:15].view(3, 4)),
        (torch.randn(3, 4).detach(), torch.randn(3, 4)),
        (torch.randn(3, 4), torch.randn(4, 3).t()),
        (torch.randn(3, 4), torch.randn(5)),
        (torch.randn(3, 4), torch.randn(3, 4).bfloat16()),
        (torch.randn(3, 4), torch.inference_mode()(torch.ones)(3, 4)),
        (torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64).conj()),
    ],
)
def test_data_is_exchanged_as_by_assignment(way, old, new):
    p = torch.nn.Parameter(old.clone()) if not old.is_complex() else old.clone()
    twin = p.detach().clone()
    twin.data = new
    version = p._version
    eager.set_data([p], [new])
    assert torch.equal(p, twin) and p.dtype == new.dtype and p.stride() == new.stride()
    assert p.data_ptr() == new.data_ptr() and p.is_inference() == twin.is_inference()
    assert p.is_inference() or p._version == version


def test_gradients_are_read_and_cleared(way):
    kept, left = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    kept.grad = torch.zeros(2)
    found = eager.with_gradients([left, kept])
    assert found[0] == [kept] and found[1][0] is kept.grad and found[2] is False
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    assert eager.with_gradients([table.weight])[2] is True
    eager.clear_gradients([left, kept])
    assert kept.grad is None and left.grad is None
    kept.grad = torch.zeros(2)
    assert eager.with_gradients((left, kept))[0] == [kept]


def test_lists_that_change_while_they_are_gone_through(way):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    for p in params:
        p.grad = torch.zeros(2)
    watch = weakref.ref(params[0].grad, lambda _: params.clear())
    eager.clear_gradients(params)
    assert watch() is None and not params


def test_another_thread_may_empty_the_lists_of_a_step_uphill():
    big = [torch.ones(1 << 22) for _ in range(3)]
    lists = [[t.clone() for t in big] for _ in range(3)]
    found, expected = list(lists[0]), big[0] + 0.5 / (3 * (1 << 22)) ** 0.5

    def empty():
        while found[0][0] == 1:  # until the step has begun
            time.sleep(0)
        for part in lists:
            part.clear()

    thread = threading.Thread(target=empty, daemon=True)
    originals = list(lists[1])
    thread.start()
    taken = eager.climb(*lists, originals, 0.5, None)
    thread.join()
    assert taken and all(torch.equal(t, expected) for t in found)


# --- which library ---


def test_a_library_of_another_torch_or_python_is_not_loaded(monkeypatch, tmp_path):
    ours = next(eager.Path(eager.__file__).parent.glob("_eager.*"))
    for name, value in (("library", None), ("why_not", ""), ("__file__", str(tmp_path / "eager.py"))):
        monkeypatch.setattr(eager, name, value)
    eager.load()
    assert eager.library is None and eager.why_not == "was not built"
    other = ours.name.replace(f"torch-{torch.__version__}", "torch-2.9.0")
    shutil.copy(ours, tmp_path / other)
    eager.load()
    assert eager.library is None and eager.why_not == f"built for another torch or Python: {other}"
    (tmp_path / ours.name).write_bytes(b"no library")
    eager.load()
    assert eager.library is None and eager.why_not.startswith("does not load: ")
    monkeypatch.setenv("QKERNELS_EAGER", "0")
    eager.load()
    assert eager.library is None and eager.why_not == "switched off (QKERNELS_EAGER=0)"
