"""The CUDA kernels, run on the host thread by thread: the table of cases, every walk, and the emulator's own eyes."""

import ctypes
import itertools
import random

import pytest
import torch
from cuda_host import build
from cuda_host.launch import Launchers
from layers import same_bits

from qkernels import reference, testing
from qkernels.reference import perturb as moves

if build.missing():
    pytest.skip(f"the CUDA kernels are not run on the host: {build.missing()}", allow_module_level=True)

# The first test compiles.
pytestmark = pytest.mark.timeout(400)

# (repetitions, rows, inner): both walks, every size of team, rows in one and in several parts, tiles of columns,
# lengths that are no multiple of a chunk.
WALKS = (
    (1, 1, 1), (1, 1, 37), (1, 1, 2049), (1, 1, 40003), (1, 7, 5), (3, 5, 1), (40, 3, 1), (100, 27, 1), (17, 2100, 1),
    (5, 1030, 2), (9, 5, 9), (30, 6, 31), (12, 40, 16), (1, 64, 9), (2, 3, 32), (4, 5, 49), (3, 4, 100),
    (3, 4, 129), (2, 5, 300), (2, 3, 1025), (1, 2, 7001), (2, 3, 3001), (2, 80, 33),
)  # fmt: skip
WALKED = ("fake_quantize_backward", "quantize", "standardized_distance", "standardized_distance_backward")


@pytest.fixture(scope="module")
def library():
    return build.library()


def run(library, op, args, seed=""):
    """The outputs, which depend neither on alignment (of any one tensor) nor on the order of threads and blocks."""
    chance = random.Random(seed)
    results = []
    for shift, backwards in ((lambda: 0, False), (lambda: chance.choice((0, 0, 1, 3)), True)):
        launchers = Launchers(library, shift, backwards)
        results.append(getattr(launchers, op)(*args))
        launchers.memory.check()
    assert same_bits(*results), "alignment or the order of threads changes the result"
    return results[0]


def check(library, case):
    args = case.args()
    got = run(library, case.op, args, case.id(""))
    testing.compare(case, args, got, testing.backends(case.op)["reference"](*args))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id("host")) for case in testing.cases()])
def test_parity(case, library):
    check(library, case)


@pytest.mark.parametrize("op", WALKED)
@pytest.mark.parametrize("shape", WALKS, ids=str)
def test_walks(shape, op, library):
    for dtype, option in itertools.product((torch.float32, torch.bfloat16), testing.OPS[op].options[:4]):
        check(library, testing.Case(op, shape, dtype, "axis1", "contiguous", option))


@pytest.mark.parametrize("op", ["pack", "unpack"])
def test_lengths_of_packed_tensors(op, library):
    for numel, dtype, bits in itertools.product((1, 3, 5, 31, 33, 1000, 40003), testing.INTEGERS, (2, 4, 8)):
        check(library, testing.Case(op, (numel,), dtype, "tensor", "contiguous", f"bits{bits}"))


def test_long_lists_take_several_launches(library):
    generator = torch.Generator().manual_seed(0)

    def draw(k):
        numel, dtype = 20000 if k == 150 else k % 5, torch.float32 if k % 20 else torch.bfloat16
        return torch.randn(numel, generator=generator).to(dtype)

    # More than a launch takes of one dtype.
    lists = [[draw(k) for k in range(345)] for _ in range(2)]
    params, directions = lists
    for got, want in zip(run(library, "multi_norm", (params, directions, 0.01)),
                         reference.multi_norm(params, directions, 0.01)):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        run(library, "multi_dot", lists), reference.multi_dot(*lists), rtol=1e-12, atol=1e-9
    )
    table = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.1, 0.5]], dtype=torch.float64)
    seed, out = torch.tensor([-5]), [torch.empty_like(w) for _ in table for w in params]
    for move in (moves.ALONG, moves.NORMAL):
        args = params, directions, [], move, table, seed, 7
        got = run(library, "multi_perturb", (out, *args))
        reference.multi_perturb(out, *args)
        assert same_bits(got, out)


@pytest.mark.parametrize("move", range(7))
def test_a_copy_may_be_written_over_its_parameters(move, library):
    lists = [
        [torch.randn(n).to(t) for n, t in ((1000, torch.float32), (37, torch.bfloat16))] for _ in range(3)
    ]
    settings = move, torch.tensor([[0.3, 0.1, 0.05]], dtype=torch.float64), torch.tensor([5]), 0
    out = [torch.empty_like(w) for w in lists[0]]
    reference.multi_perturb(out, *lists, *settings)
    got = Launchers(library, lambda: 0, False).multi_perturb(lists[0], *lists, *settings)
    assert same_bits(got, out)


def test_empty_lists_of_elements(library):
    empty = [torch.empty(0), torch.empty(0, 3)]
    assert not torch.cat(run(library, "multi_norm", (empty, [], 0.0))).any()
    assert not run(library, "multi_dot", (empty, empty)).any()


def test_the_emulator_sees_faults(library):
    x, y = torch.arange(65.0), torch.zeros(65)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
    for backwards in (False, True):
        library.emulator_order(ctypes.c_bool(backwards))
        for wait in (True, False):
            assert library.fault_order(*pointers, ctypes.c_bool(wait)) == 0
            assert torch.equal(y[:64], x[:64].flip(0)) == wait
    for _ in range(2):
        assert library.fault_unwritten(pointers[1]) == 0
        assert y[:64].isnan().all()
        assert library.fault_barrier() == 719
        assert library.fault_rewritten(pointers[1]) == 700
    assert library.fault_grid() == 9
    assert library.fault_alignment(*pointers) == 0
    for k in (0, 1):
        moved = [ctypes.c_void_p(p.value + 4 * (k == i)) for i, p in enumerate(pointers)]
        assert library.fault_alignment(*moved) == 716
    assert library.cudaGetLastError() == 0
