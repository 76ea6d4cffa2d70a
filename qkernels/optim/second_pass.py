"""What makes a second pass: perturbed copies in the weights' place, and normalisation statistics that stand still.

Both remember what they found in the step before, and look whether it is still so: searching and allocating anew
would cost a small model more than the arithmetic.
"""

import contextlib
import itertools

import torch
from torch import nn

from .. import backend, eager, layout, ops
from . import lists


class Exchange:
    """Copies w + e of a list of weights, in memory that serves every step, which change places with the weights."""

    def __init__(self):
        self._forget()

    def _forget(self):
        self._addresses, self._originals, self.copies = None, [], []

    def __call__(self, params, gradients, norm, rho, eta, undo):
        """Write the copies (``ops.multi_climb``) and put them in the place of ``params`` until ``undo`` is closed."""
        whole = self._climb(params, gradients, norm, rho, eta)
        if not whole:
            whole = lists.whole(params) and lists.whole(gradients)
            weights, directions = (params, gradients) if whole else map(lists.locals_of, (params, gradients))
            self._write(weights, directions, norm, rho, eta)
        if whole:
            undo.callback(_point, params, self._originals)
            _point(params, self.copies)
            return
        for p, w, original, c in zip(params, weights, self._originals, self.copies):
            if w is p:
                undo.callback(_point, [p], [original])
                _point([p], [c])
            else:
                # A shard is read through other views of its memory, so there the contents change.
                undo.callback(w.copy_, w.clone())
                w.copy_(c)

    def _climb(self, params, gradients, norm, rho, eta):
        """The short way, where everything is as it was; whether it has been gone."""
        if norm is not None or self._addresses is None or backend.forced() not in (None, "native"):
            return False
        return eager.climb(self.copies, params, gradients, self._originals, rho, eta)

    def _write(self, weights, *settings):
        # The originals keep their memory, so that an address that has not changed is still theirs.
        addresses = list(map(torch.Tensor.data_ptr, weights))
        if addresses == self._addresses:
            # The op refuses copies that are laid out otherwise than the weights are now.
            with contextlib.suppress(RuntimeError):
                return ops.multi_climb(self.copies, weights, *settings)
        self._forget()  # first, so that there are never two copies
        self._originals, self.copies = [w.data for w in weights], ops.empty_copies(weights)
        ops.multi_climb(self.copies, weights, *settings)
        # Other strides over a memory with gaps would not show in the layout of a copy.
        self._addresses = addresses if all(layout.dense(w) is w for w in weights) else None


class Statistics:
    """The normalisation layers of a model whose running statistics a pass would update."""

    def __init__(self, model):
        self._model, self._dicts, self._children, self._norms = model, [], None, []

    def freeze(self, undo):
        """Leave the running statistics alone until ``undo`` is closed."""
        children = self._look()
        if children != self._children:
            modules = list(self._model.modules())
            self._dicts = [m._modules for m in modules]
            self._children = self._look()
            self._norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        tracking = [m for m in self._norms if m.training and m.track_running_stats]
        undo.callback(_track, tracking, True)
        _track(tracking, False)

    def _look(self):
        """The children of all modules: lists of the same objects compare equal fast."""
        return list(itertools.chain.from_iterable([d.values() for d in self._dicts]))


def _point(params, tensors):
    _twice_if_interrupted(eager.set_data, params, tensors)


def _track(norms, value):
    _twice_if_interrupted(_set_track, norms, value)


def _set_track(norms, value):
    # nn.Module's own __setattr__ looks among parameters, buffers and modules first, for a microsecond.
    for m in norms:
        object.__setattr__(m, "track_running_stats", value)


def _twice_if_interrupted(change, *args):
    """A Ctrl-C in the middle leaves nothing half done."""
    try:
        change(*args)
    except BaseException:
        change(*args)
        raise
