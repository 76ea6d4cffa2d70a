"""The seed of a step's noise: one draw for a whole model, found again where activation checkpointing computes again."""

import torch


class SeedSource:
    """The seed of this step, one draw for a whole model; layers differ by their stream.

    ``begin`` and ``end`` are the model's forward hooks; layers that are called outside of its forward draw for
    themselves. The seed is a new int64 tensor each time, drawn from torch's generator, so that torch.manual_seed and
    checkpoints of the generator reproduce a run. Activation checkpointing brings the generator back to where it was,
    and by that the seed is found again; without (``preserve_rng_state=False``, a compiled part) it is the latest one.
    """

    def __init__(self, seed=None):
        self.seed, self.held = seed, seed is not None
        self.past = {}  # state of the generator -> seed, None where a layer drew its own

    def __getstate__(self):
        return {**self.__dict__, "past": {}}

    def begin(self, module, args):
        self.seed = torch.ops.qkernels.draw_seed(next(module.parameters())) if module.training else None
        self.held = True

    def end(self, module, args, output):
        self.held = False

    def current(self, x):
        # A compiler cannot tell what is computed again, so compiled parts keep the seed of the model's last forward.
        compiling = torch.compiler.is_compiling()
        again = compiling or torch._C._current_graph_task_id() >= 0  # autograd runs
        if again and not compiling and (place := _generator_state(x.device)) in self.past:
            seed = self.past[place]
            return torch.ops.qkernels.draw_seed(x) if seed is None else seed
        own = not self.held and not (again and self.seed is not None)
        if not again and _may_be_checkpointed():
            self._remember(_generator_state(x.device), x, own)
        if own:
            self.seed = None
            return torch.ops.qkernels.draw_seed(x)
        return self._shared(x)

    def _shared(self, x):
        if self.seed is None or self.seed.device != x.device:
            self.seed = torch.ops.qkernels.draw_seed(x)
        return self.seed

    def _remember(self, place, x, own):
        if len(self.past) >= _PLACES:
            del self.past[next(iter(self.past))]
        self.past[place] = None if own else self._shared(x)


_PLACES = 4096  # that are remembered; a forward has one, and one more for each dropout


def _may_be_checkpointed():
    """Whether what is computed now may be computed again in backward: its tensors are not kept, or not by autograd."""
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _generator_state(device):
    """The state of torch's generator for a device, as a number or numbers."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        return generator.initial_seed(), generator.get_offset()
    return hash(torch.default_generator.get_state().numpy().tobytes())
