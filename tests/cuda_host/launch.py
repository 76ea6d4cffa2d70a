"""The CUDA launchers called as the ops are, on the host: what csrc/cuda/bind*.cpp do, on memory that is watched."""

import ctypes
import math

import torch

from qkernels import layout, noise, reference
from qkernels.reference import perturb as moves

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ERRORS = {
    9: "empty or too large a grid",
    700: "memory of the read-only cache is written",
    716: "misaligned access",
    719: "threads disagree on a barrier",
}
GUARD, PATTERN, POISON = 64, 0xFF, 99
# Copies that share one launch: fewer than csrc/cuda/bind_perturb.cpp takes, so that few of them need several.
TOGETHER = 2


class Memory:
    """The tensors of one call, each between guard bytes and `shift()` elements past an aligned address."""

    def __init__(self, shift):
        self.shift, self.inputs, self.outputs = shift, [], []

    def _room(self, shape, stride, dtype):
        head, size = GUARD + self.shift() * dtype.itemsize, math.prod(shape) * dtype.itemsize
        raw = torch.full((head + size + GUARD,), PATTERN, dtype=torch.uint8)
        return raw, raw[head : head + size].view(dtype).as_strided(shape, stride)

    def put(self, t):
        """A copy of the dense t, or None."""
        if t is None:
            return None
        raw, copy = self._room(t.shape, t.stride(), t.dtype)
        copy.copy_(t)
        self.inputs.append((raw, raw.clone()))
        return copy

    def like(self, t, dtype=None):
        """Room for an output as torch.empty_like makes it: NaN, or an integer no kernel writes by chance."""
        made = torch.empty_like(t, dtype=dtype)
        raw, out = self._room(made.shape, made.stride(), made.dtype)
        if not out.dtype.is_floating_point:
            out.fill_(POISON)
        self.outputs.append((raw, out))
        return out

    def empty(self, count, dtype):
        return self.like(torch.empty(count, dtype=dtype))

    def check(self):
        assert all(torch.equal(raw, kept) for raw, kept in self.inputs), "an input was written"
        for raw, out in self.outputs:
            around = raw.numel() - out.numel() * out.element_size()
            inside = raw[around - GUARD : raw.numel() - GUARD]
            written = inside.clone()
            inside.fill_(PATTERN)
            assert (raw == PATTERN).all(), "bytes beside an output were written"
            inside.copy_(written)


class Launchers:
    """The library's launchers under the ops' names, with the ops' arguments."""

    def __init__(self, library, shift, backwards):
        self.library, self.memory = library, Memory(shift)
        library.emulator_order(ctypes.c_bool(backwards))

    def call(self, name, *args):
        def convert(arg):
            if isinstance(arg, torch.Tensor):
                return ctypes.c_void_p(arg.data_ptr())
            if isinstance(arg, torch.dtype):
                return ctypes.c_int64(DTYPES.index(arg))
            if arg is None or isinstance(arg, ctypes.Array):
                return arg
            return ctypes.c_double(arg) if isinstance(arg, float) else ctypes.c_int64(arg)

        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*map(convert, args))

    def launch(self, name, *args):
        error = self.call(name, *args)
        if error:
            raise RuntimeError(f"{name}: {ERRORS.get(error, f'cudaError {error}')}")

    def _rows(self, x, scale, offset, zero_point, axis):
        """The walk over the dense x, and the numbers of its rows."""
        walk = (ctypes.c_int64 * 3)(x.numel(), *layout.rows_inner(x, scale.numel(), axis))
        return walk, [
            self.memory.put(v if v is None else v.contiguous()) for v in (scale, offset, zero_point)
        ]

    def fake_quantize(
        self, x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed, stream, shift, shift_scale
    ):  # fmt: skip
        put, shifted = self.memory.put, kind == noise.SHIFT
        x = put(layout.ordered(x, scale.numel(), axis))
        walk, numbers = self._rows(x, scale, offset, zero_point, axis)
        seed = None if shifted or kind == noise.PLAIN else put(seed)
        shift, shift_scale = (put(layout.aligned(shift, x)), put(shift_scale)) if shifted else (None, None)
        y = self.memory.like(x)
        self.launch("fake_quantize", walk, x.dtype, x, y, *numbers, quant_min, quant_max, kind, a, b, seed, stream,
                    shift, shift_scale)  # fmt: skip
        return y

    def fake_quantize_backward(
        self, grad, x, scale, offset, zero_point, axis, quant_min, quant_max, grad_scale, clip_only, ewgs, kind, a, b,
        seed, stream,
    ):  # fmt: skip
        put, room = self.memory.put, self.memory.empty
        x = put(layout.ordered(x, scale.numel(), axis))
        grad = put(layout.aligned(grad, x))
        walk, numbers = self._rows(x, scale, offset, zero_point, axis)
        if kind in (noise.TEMPERING, noise.AFTER, noise.SHIFT):
            kind = noise.PLAIN
        rows, offsets, compute = scale.numel(), 0 if offset is None else scale.numel(), scale.dtype
        partial = room(self.call("walk_sums", walk) * (2 if offsets else 1), compute)
        dx, dscale, doffset = self.memory.like(x), room(rows, compute), room(offsets, compute)
        self.launch("fake_quantize_backward", walk, x.dtype, grad, x, dx, *numbers, quant_min, quant_max, grad_scale,
                    clip_only, ewgs, kind, a, b, None if kind == noise.PLAIN else put(seed), stream, dscale, doffset,
                    partial)  # fmt: skip
        return dx, dscale, doffset

    def quantize(self, x, scale, offset, zero_point, axis, quant_min, quant_max):
        x = self.memory.put(layout.ordered(x, scale.numel(), axis))
        walk, numbers = self._rows(x, scale, offset, zero_point, axis)
        q = self.memory.like(x, torch.uint8 if quant_max > 127 else torch.int8)
        self.launch("quantize", walk, x.dtype, x, q, *numbers, quant_min, quant_max)
        return q

    def dequantize(self, q, scale, offset, zero_point, axis, dtype):
        q = self.memory.put(layout.ordered(q, scale.numel(), axis))
        walk, numbers = self._rows(q, scale, offset, zero_point, axis)
        y = self.memory.like(q, dtype)
        self.launch("dequantize", walk, dtype, q, q.dtype == torch.int8, y, *numbers)
        return y

    def pack(self, q, bits):
        q = self.memory.put(q.contiguous())
        p = self.memory.empty(-(-q.numel() * bits // 8), torch.uint8)
        self.launch("pack", q, q.numel(), bits, p)
        return p

    def unpack(self, p, bits, numel, is_signed):
        p = self.memory.put(p.contiguous())
        q = self.memory.empty(numel, torch.int8 if is_signed else torch.uint8)
        self.launch("unpack", p, numel, bits, is_signed, q)
        return q

    def _pair(self, student, teacher, axis):
        student = self.memory.put(layout.dense(student))
        teacher = self.memory.put(layout.aligned(teacher, student))
        rows = student.shape[axis]
        return (
            student,
            teacher,
            (ctypes.c_int64 * 3)(student.numel(), *layout.rows_inner(student, rows, axis)),
        )

    def standardized_distance(self, student, teacher, axis, eps, mean):
        compute = torch.float64 if student.dtype == torch.float64 else torch.float32
        student, teacher, walk = self._pair(student, teacher, axis)
        distance = self.memory.empty(walk[1], compute)
        moments = self.memory.like(torch.empty(5, walk[1], dtype=torch.float64))
        partial = self.memory.empty(5 * self.call("walk_partials", walk), torch.float64)
        self.launch("standardized_distance", walk, student.dtype, student, teacher, eps, mean, partial, distance,
                    moments)  # fmt: skip
        return distance, moments

    def standardized_distance_backward(self, grad, student, teacher, moments, axis, eps, mean):
        stride, compute = grad.stride(0), grad.dtype
        student, teacher, walk = self._pair(student, teacher, axis)
        grad = self.memory.put(grad.as_strided((1 + (walk[1] - 1) * stride,), (1,)))
        moments = self.memory.put(moments.contiguous())
        slopes, ds = self.memory.empty(5 * walk[1], compute), self.memory.like(student)
        self.launch("standardized_distance_backward", walk, student.dtype, grad, stride, student, teacher, moments,
                    eps, mean, slopes, ds)  # fmt: skip
        return ds

    def _list(self, first, *others):
        """(count, dtypes, numels) and the addresses of each list, None for an empty one."""
        first = [self.memory.put(layout.dense(t)) for t in first]
        lists = [first]
        for other in others:
            lists.append([self.memory.put(layout.aligned(t, like)) for t, like in zip(other, first)])
        numbers = [
            len(first),
            _integers(DTYPES.index(t.dtype) for t in first),
            _integers(t.numel() for t in first),
        ]
        return first, numbers, [_addresses(tensors) for tensors in lists]

    def multi_norm(self, tensors, weights, eta):
        first, numbers, (t, w) = self._list(tensors, weights)
        norm, norms = self.memory.empty(1, torch.float64), self.memory.empty(len(first), torch.float64)
        squares = self.memory.empty(len(first), torch.float64).zero_()
        partial = self.memory.empty(self.call("list_chunks", numbers[0], numbers[2]), torch.float64)
        self.launch("multi_norm", *numbers, w, t, eta, partial, squares, norms, norm)
        return norm, norms

    def multi_dot(self, a, b):
        _, numbers, (a, b) = self._list(a, b)
        partial = self.memory.empty(3 * self.call("list_chunks", numbers[0], numbers[2]), torch.float64)
        sums = self.memory.empty(3, torch.float64)
        self.launch("multi_dot", *numbers, a, b, partial, sums)
        return sums

    def multi_perturb(self, out, params, directions, points, move, coefficients, seed, first_copy):
        first, numbers, (w, d, p) = self._list(params, directions, points)
        made = first if out is params else [self.memory.like(first[i % len(first)]) for i in range(len(out))]
        table, copies = self.memory.put(coefficients.contiguous()), len(coefficients)
        seed = self.memory.put(seed) if move in moves.DRAWN else None
        for k in range(0, copies, TOGETHER):
            count = min(TOGETHER, copies - k)
            some = _addresses(made[k * len(first) : (k + count) * len(first)])
            self.launch("multi_perturb", *numbers, w, d, p, some, count, move, table, coefficients.shape[1], seed, k,
                        first_copy + k)  # fmt: skip
        return tuple(made)

    def multi_climb(self, *args):
        """On CUDA, too, made of the other two."""
        made = []
        reference.multi_climb(
            *args, norm_of=self.multi_norm, perturb=lambda *given: made.extend(self.multi_perturb(*given))
        )
        return tuple(made)


def _integers(values):
    values = list(values)
    return (ctypes.c_int64 * len(values))(*values)


def _addresses(tensors):
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)) if tensors else None
