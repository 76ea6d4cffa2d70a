"""The seed of a step's noise: one draw for a whole model, found again where activation checkpointing computes again."""

import warnings

import torch


def draw(like):
    """A new seed on the device of ``like``: one for all that vmap computes together; their noise differs."""
    return torch.ops.qkernels.draw_seed(torch.empty(0, device=like.device))


class SeedSource:
    """The seed of this step, one draw for a whole model; layers differ by their stream.

    ``begin`` and ``end`` are forward hooks of the model: between them all layers share one seed, and a layer that is
    called on its own draws one. The seed is a new int64 tensor each time, drawn from torch's generator, so that
    torch.manual_seed and checkpoints of the generator reproduce a run. Activation checkpointing restores the generator
    before it computes again, and the seed is looked up by that state; where it does not (``preserve_rng_state=False``,
    compiled parts) the last seed is used.
    """

    def __init__(self, seed=None):
        self.seed, self.held = seed, seed is not None
        # State of the generator -> seed, None where one was drawn; and whether some had to go.
        self.past, self.forgotten = {}, False

    def __getstate__(self):
        return {**self.__dict__, "past": {}}

    def begin(self, module, args):
        self.seed = draw(next(module.parameters())) if module.training else None
        self.held = True

    def end(self, module, args, output):
        self.held = False

    def current(self, x):
        # A compiler cannot tell what is computed again, so compiled parts keep the seed of the model's last forward.
        compiling = torch.compiler.is_compiling()
        again = compiling or torch._C._current_graph_task_id() >= 0  # autograd runs
        if again and not compiling:
            place = _generator_state(x.device)
            if place in self.past:
                seed = self.past[place]
                return draw(x) if seed is None else seed
            if self.forgotten and place is not None:
                warnings.warn(
                    "noise is computed again long after its forward, whose seed may be forgotten: "
                    f"those of the last {_PLACES} forwards of checkpointed parts are kept",
                    stacklevel=2,
                )
        own = not self.held and not (again and self.seed is not None)
        drawn = own or self.seed is None or self.seed.device != x.device
        if not again and _may_be_checkpointed():
            self._remember(_generator_state(x.device), None if drawn else self.seed)
        if not drawn:
            return self.seed
        seed = draw(x)
        self.seed = None if own else seed
        return seed

    def _remember(self, place, seed):
        if place is None:
            return
        if len(self.past) >= _PLACES and place not in self.past:
            del self.past[next(iter(self.past))]
            self.forgotten = True
        self.past[place] = seed


_PLACES = 1 << 14  # that are remembered; a forward has one, and one more for each dropout


def _may_be_checkpointed():
    """Whether what is computed now may be computed again in backward: its tensors are not kept, or not by autograd."""
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _generator_state(device):
    """The state of torch's generator for a device, as a number or numbers; None where nobody may look."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        generator = torch.cuda.default_generators[device.index]
        return generator.initial_seed(), generator.get_offset()
    if torch._C._len_torch_dispatch_stack() > 0:  # the state would be a tensor of that mode
        return None
    return hash(torch.default_generator.get_state().numpy().tobytes())
