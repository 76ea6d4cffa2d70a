"""SAM, ASAM and their LookSAM form: perturb all weights by their gradient, take the gradient there, come back, step."""

import contextlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import nn

from .. import eager, ops, quantizers
from .. import nn as qnn
from ..wrapped import check_unflattened
from . import lists
from .second_pass import Exchange, Statistics

Loss = TypeVar("Loss")


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around any torch optimizer.

    e = rho g / ||g||, or rho T^2 g / ||T g|| with T = |w| + eta where ``adaptive`` (ASAM); the base optimizer steps
    with g_s, the gradient at w + e. One norm over all parameters; a group's own ``rho`` scales its part.
    With ``every`` = tau > 1 (LookSAM) g_s is computed in steps tau, 2 tau, ... only, as in SAQ's Algorithm 1; there
    g_v = g_s - (g_s.g / g.g) g is kept, and between g_s = g + beta ||g|| g_v / ||g_v||, norms over everything. Before
    step tau there is no g_v, and g_s = g. With ``vanilla_loss`` the base optimizer steps with g_s + g.

        loss = optimizer.step(closure)          # closure: zero_grad, forward, backward, return the loss

    or, in two passes of your own:

        with optimizer.first_pass():
            loss = criterion(model(x), y); loss.backward()
        if optimizer.first_step():              # True: the weights are perturbed, gradients are None
            criterion(model(x), y).backward()
        optimizer.second_step(); optimizer.zero_grad()

    Args:
        model: the module whose forward the passes run; a DistributedDataParallel wrapper as it is.
        base: the optimizer that steps; its param_groups are this optimizer's, each may have its own ``rho``.
        rho: radius, >= 0; where every group has 0, this is the base optimizer to the bit and no second pass runs.
        adaptive, eta: ASAM. every, beta: LookSAM's tau and beta. vanilla_loss: add g.
        perturb_scales: also perturb the quantizers' own parameters (step sizes, clip levels).
        sync_perturbation: under DDP, perturb by the mean gradient of all processes, instead of each by its own
            (m-sharpness). Sharded parameters (FSDP2) have synchronised gradients always.
        max_norm: clip the norm of the gradient the base optimizer steps with.

    BatchNorm statistics are updated in the first pass only. GradScaler: scale the loss in the closure and give the
    scaler to ``step`` or ``second_step``; e and g_v / ||g_v|| do not depend on the scale. Gradient accumulation: let
    each pass run several backwards. The perturbed copy is the only extra memory (with every > 1 also g_v).

    Raises: ValueError (rho < 0, every < 1, no closure), TypeError (a closure that returns None), RuntimeError (no
    parameter has a gradient; steps out of order).
    Source: Foret et al. 2021, eq. 2; Kwon et al. 2021, eq. 5; Liu et al. 2022 (LookSAM); SAQ, Algorithm 1.
    """

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float = 0.05, *, adaptive: bool = False,
                 eta: float = 0.01, every: int = 1, beta: float = 0.7, vanilla_loss: bool = False,
                 perturb_scales: bool = False, sync_perturbation: bool = False,
                 max_norm: float | None = None) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a torch optimizer instance, got {base!r}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int >= 1, got {every!r}")
        for name, value in (("rho", rho), ("eta", eta), ("beta", beta)):
            _check_size(name, value)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be a number > 0 or None, got {max_norm!r}")
        check_unflattened(model, type(self).__name__)
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"base must step without a closure, which {type(base).__name__} cannot")
        self.model, self.base = model, base
        self.adaptive, self.eta, self.every, self.beta = adaptive, eta, every, beta
        self.vanilla_loss, self.perturb_scales = vanilla_loss, perturb_scales
        self.sync_perturbation, self.max_norm = sync_perturbation, max_norm
        super().__init__(base.param_groups, {**base.defaults, "rho": float(rho)})
        self.param_groups = base.param_groups
        for group in self.param_groups:
            _check_size("rho", self._rho(group))
        self._scales = set() if perturb_scales else quantizers.numbers_of(model)
        self._warn_of_steps_that_stay()
        self.steps = 0  # finished steps
        self._undo = contextlib.ExitStack()  # what takes the perturbation back
        self._stage, self._local_gradients = "first", False
        self._first: list[tuple[float, list[torch.Tensor], list[torch.Tensor]]] = []
        self._exchanges: list[Exchange] = []
        self._statistics, self._length = Statistics(model), None

    def _warn_of_steps_that_stay(self):
        """An optimizer made before quantize_ has the weights, but not their step sizes."""
        given = {id(p) for group in self.param_groups for p in group["params"]}
        left = [
            name
            for name, m in self.model.named_modules()
            if isinstance(m, qnn._Quantized) and id(m.weight) in given
            for q in (m.weight_quantizer, m.input_quantizer)
            if q is not None and any(p.requires_grad and id(p) not in given for p in q.parameters())
        ]
        if left:
            warnings.warn(
                f"base does not train the step sizes of {', '.join(dict.fromkeys(left))}: make it after quantize_, of "
                "qk.param_groups(model, lr)",
                stacklevel=3 if type(self) is SAM else 4,
            )

    # --- the two passes ---

    @overload  # without a closure it raises
    def step(self, closure: None = None, scaler: torch.amp.GradScaler | None = None) -> NoReturn: ...

    @overload
    def step(self, closure: Callable[[], Loss], scaler: torch.amp.GradScaler | None = None) -> Loss: ...

    def step(
        self, closure: Callable[[], Loss] | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> Loss:
        """One step: ``closure`` clears gradients, runs forward and backward and returns the loss; called once or twice.

        Returns: the loss of the first pass. scaler: a GradScaler whose scale the closure applied; its ``update`` is
        yours to call, but for a skipped batch. A closure that leaves no gradient and returns None, or a loss without a
        graph, skips the batch, as torch's optimizers do; a warning says so.
        """
        if closure is None:
            raise ValueError(
                "step needs closure: it clears gradients, runs forward and backward, returns the loss"
            )
        try:
            self._ready()
            with self.first_pass(), torch.enable_grad():
                loss = closure()
            if self._skipped(loss):
                return loss
            if self.first_step():
                with torch.enable_grad():
                    second = closure()
                if self._skipped(second):
                    return loss
            self.second_step(scaler)
        finally:
            self.restore()
        return loss

    def _skipped(self, loss):
        """Whether the closure left nothing to step with, on purpose; TypeError where the loss alone is missing."""
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            if loss is None:
                raise TypeError("closure must return the loss, got None")
            return False
        if loss is not None and getattr(loss, "requires_grad", True):
            return False  # its backward was forgotten, which first_step says
        warnings.warn("the closure left no gradient: this step does nothing", stacklevel=4)
        return True

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around the first forward and backward: keeps DDP's gradients local where m-sharpness needs them so."""
        model, self._local_gradients = self.model, False
        if (
            self._due()
            and not self.sync_perturbation
            and isinstance(model, nn.parallel.DistributedDataParallel)
        ):
            self._local_gradients = True
            with model.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def first_step(self) -> bool:
        """After the first backward: perturb, and clear the gradients, where this step has a second pass.

        Returns: True if it has one. ``second_step`` follows either way.
        """
        if self._stage != "first":
            raise RuntimeError("first_step was called twice: call second_step, or restore, in between")
        first = []
        for group in self.param_groups:
            params, gradients, sparse = eager.with_gradients(group["params"])
            if sparse:
                raise RuntimeError(
                    "sparse gradients are not supported: make the embedding dense (sparse=False)"
                )
            if params:
                first.append((self._rho(group), params, gradients))
        if not first:
            raise RuntimeError(
                "no parameter has a gradient: run backward before first_step, or in the closure"
            )
        self._stage, self._first, due = "second", first, self._due()
        if due:
            try:
                self._statistics.freeze(self._undo)
                self._perturb()
            except BaseException:
                self.restore()
                raise
            self._keep_gradients()
            for _, params, _ in first:
                eager.clear_gradients(params)
        return due

    def _keep_gradients(self):
        """Of the first pass, what the end of the step will need; the rest makes room for the second pass."""
        if not self.vanilla_loss and self.every == 1:
            self._first = []
        elif getattr(self.model, "gradient_as_bucket_view", False):
            self._first = [(rho, params, [g.clone() for g in grads]) for rho, params, grads in self._first]

    @torch.no_grad()
    def second_step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take the perturbation back, make the objective's gradient, let the base optimizer (or scaler) step."""
        if self._stage != "second":
            raise RuntimeError("second_step needs first_step before it")
        due, first = self._due(), [pair for _, *members in self._first for pair in zip(*members)]
        self.restore()
        if due:
            self._after_second_pass(first)
        elif self._active():
            self._between(first)
        if self.max_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.base)
            nn.utils.clip_grad_norm_(
                [p for group in self.param_groups for p in group["params"]], self.max_norm
            )
        if scaler is None:
            self.base.step()
        else:
            scaler.step(self.base)
        self._opt_called = True  # for torch's schedulers, which otherwise miss a step()
        self.steps += 1
        self._ready()

    def restore(self) -> None:
        """Take the perturbation back, if there is one; the step counts as not begun."""
        self._undo.close()
        self._stage, self._first = "first", []
        self._ready()

    def _ready(self):
        """A first pass may begin."""

    def _rho(self, group):
        """A group that was added to the base optimizer has none of its own."""
        return group.get("rho", self.defaults["rho"])

    def _active(self):
        return any(self._rho(group) > 0 for group in self.param_groups)

    def _due(self):
        return (self.steps + 1) % self.every == 0 and self._active()

    # --- perturbation ---

    def _perturb(self):
        """Put w + e in place of every w that is perturbed."""
        parts = self._parts()
        if not parts:
            raise RuntimeError(
                "nothing to perturb has a gradient: does the backward reach parameters with rho > 0?"
            )
        self._ascend(parts)

    def _parts(self, without=()):
        """{rho: (parameters, gradients)} of what is perturbed directly; ``without``: ids of parameters left out."""
        left_out, parts = self._scales.union(without), {}
        for rho, params, gradients in self._first:
            if left_out:
                kept = [i for i, p in enumerate(params) if id(p) not in left_out]
                params, gradients = [params[i] for i in kept], [gradients[i] for i in kept]
            if rho > 0 and params:
                former = parts.get(rho, ([], []))
                parts[rho] = former[0] + params, former[1] + gradients
        return dict(sorted(parts.items()))

    def _ascend(self, parts, norm=None):
        """Exchange w + e for w, one call for each value of rho; ``norm`` of all gradients if others belong to them."""
        eta = self.eta if self.adaptive else None
        if norm is None and (len(parts) > 1 or not all(lists.whole(grads) for _, grads in parts.values())):
            weights, gradients = (list(itertools.chain(*members)) for members in zip(*parts.values()))
            norm = lists.norm(gradients, weights, eta) if self.adaptive else lists.norm(gradients)
        while len(self._exchanges) < len(parts):
            self._exchanges.append(Exchange())
        del self._exchanges[len(parts) :]
        for exchange, (rho, (params, gradients)) in zip(self._exchanges, parts.items()):
            exchange(params, gradients, norm, rho, eta, self._undo)

    # --- gradients ---

    def _after_second_pass(self, first):
        """From g and p.grad = g_s to the gradient of the objective; keeps g_v."""
        if not self.vanilla_loss and self.every == 1:
            return
        pairs = [(p, p.grad if p.grad is not None else torch.zeros_like(g), g) for p, g in first]
        perturbed, vanilla = [s for _, s, _ in pairs], [g for _, _, g in pairs]
        if self._local_gradients:
            lists.mean_(vanilla, self.model.process_group)
        if self.every > 1:
            along, _, square = lists.dot(perturbed, vanilla).split(1)
            for p, s, _ in pairs:
                if "direction" not in self.state[p]:
                    self.state[p]["direction"] = torch.empty_like(s)
            kept = lists.locals_of([self.state[p]["direction"] for p, _, _ in pairs])
            ops.multi_perturb(kept, lists.locals_of(perturbed), ops.ALONG, lists.ratio(-along, square),
                              lists.locals_of(vanilla))  # fmt: skip
            self._length = None
        for p, s, _ in pairs:
            p.grad = s
        if self.vanilla_loss:
            lists.combine_(
                perturbed, vanilla, torch.ones(1, 1, dtype=torch.float64, device=vanilla[0].device)
            )

    def _between(self, first):
        """In a step without second pass: g + beta ||g|| g_v / ||g_v||, and g again for the vanilla loss."""
        kept = [(g, self.state[p]["direction"]) for p, g in first if "direction" in self.state[p]]
        if kept:
            gradients, directions = [g for g, _ in kept], [d for _, d in kept]
            if self._length is None:
                self._length = lists.norm(directions)
            size = self.beta * lists.norm([g for _, g in first])
            lists.combine_(gradients, directions, lists.ratio(size, self._length), again=self.vanilla_loss)
        if self.vanilla_loss:
            for p, g in first:
                if "direction" not in self.state[p]:
                    g.mul_(2)

    # --- state ---

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; make a new one and load state_dict()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none)
        self._ready()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with g_v of LookSAM, the base optimizer's state and the number of steps: resuming is bit-exact."""
        return {**super().state_dict(), "base": self.base.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. ValueError for another optimizer's."""
        missing = {"base", "steps", "state", "param_groups"} - set(state_dict)
        if missing:
            raise ValueError(
                f"state_dict is not one of {type(self).__name__}: it lacks {', '.join(sorted(missing))}"
            )
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        self.steps, self._length = int(state_dict["steps"]), None
        self.restore()


def _check_size(name, value):
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
