"""The training loop: one step is one `optimizer.step(closure)`, so sharpness-aware optimizers need no other loop."""

import contextlib
import math
import signal
import statistics
import time

import torch

from . import checkpoint, distributed

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(RuntimeError):
    """A loss is infinite or NaN: a failure of the settings, which another attempt would repeat."""


class Trainer:
    """Trains `model` on `data.train` and can stop and continue at any step, bit for bit.

    Args:
        model: the module; its parameters are those of `optimizer`.
        optimizer: of torch, or a wrapper with `step(closure)`, `param_groups`, `state_dict` and `load_state_dict`; one
            with `first_step` evaluates the closure more than once, and takes the GradScaler as `step(closure, scaler)`.
        loss: `loss(output, target, x) -> scalar`.
        data: `.train` with `set_epoch(epoch, start_batch)` and `len`, and `.test`; both yield `(x, target)`.
        epochs: number of passes over `data.train`.
        lr_factor: `lr_factor(epoch) -> factor` on the optimizer's initial learning rates; `epoch` is fractional.
        device: where the model trains.
        amp: "none", "bf16", or "fp16" (with a GradScaler).
        accumulate: batches per optimizer step.
        clip_grad_norm: bound on the global gradient norm; 0 is off.
        compile, channels_last: torch.compile the model; keep images and convolution weights in that memory format.
        progress: `progress(trainer)` after each step.

    Raises:
        ValueError: an unknown `amp`.
    """

    def __init__(
        self,
        model,
        optimizer,
        loss,
        data,
        *,
        epochs,
        lr_factor,
        device="cpu",
        amp="none",
        accumulate=1,
        clip_grad_norm=0.0,
        compile=False,
        channels_last=False,
        progress=None,
    ):
        if amp not in AMP_DTYPES:
            raise ValueError(f"amp: {amp!r} is not one of {', '.join(AMP_DTYPES)}")
        if accumulate < 1:
            raise ValueError(f"accumulate: {accumulate} is not a positive number of batches")
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format)
        self.optimizer, self.loss, self.data, self.epochs = optimizer, loss, data, epochs
        self.lr_factor, self.accumulate, self.clip_grad_norm = lr_factor, accumulate, clip_grad_norm
        self.amp_dtype = AMP_DTYPES[amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.several_passes = hasattr(optimizer, "first_step")
        self.parallel = None
        if distributed.active():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
            if self.several_passes:
                optimizer.model = self.parallel  # it decides which of its passes exchange gradients
        self.forward = self.parallel or self.model
        if compile:
            self.forward = torch.compile(self.forward)
        self.progress = progress or (lambda trainer: None)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.epoch = self.batch = self.step = 0
        self.best_acc, self.best_loss = 0.0, math.inf  # on test and training data
        self._begin_epoch()

    def _begin_epoch(self):
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images
        self.seconds, self.batch = 0.0, 0

    def train_epoch(self, stop=lambda: False):
        """Trains to the end of the current epoch.

        Returns the epoch's record (losses are means over images), or None when `stop()` ended it at a step boundary.
        Raises Diverged.
        """
        self.model.train()
        self.data.train.set_epoch(self.epoch, start_batch=self.batch)
        timer, began, before = StepTimer(self.device), time.perf_counter(), self.seconds
        for batches in self._groups():
            timer.start()
            self._set_lr()
            self._step(batches)
            timer.stop()
            self.batch += len(batches)
            self.step += 1
            self.seconds = before + time.perf_counter() - began
            self.progress(self)
            if self.batch < len(self.data.train) and stop():
                return None
        loss, correct, count = distributed.sum_(self.sums.clone()).tolist()
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss became {loss / count} in epoch {self.epoch}; a lower lr may help"
            )
        self.seconds = before + time.perf_counter() - began
        record = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_acc": correct / count,
            "seconds": self.seconds,
            "step_ms": timer.median_ms(),
            "images_per_s": count / self.seconds,
        }
        self.epoch += 1
        self._begin_epoch()
        return record

    def _groups(self):
        """Lists of up to `accumulate` batches, on the device."""
        group = []
        for x, target in self.data.train:
            x = x.to(self.device, non_blocking=True)
            if x.dim() == 4:
                x = x.contiguous(memory_format=self.memory_format)
            group.append((x, target.to(self.device, non_blocking=True)))
            if len(group) == self.accumulate:
                yield group
                group = []
        if group:
            yield group

    def _set_lr(self):
        factor = self.lr_factor(self.epoch + self.batch / len(self.data.train))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _step(self, batches):
        """One optimizer step on the mean loss over the images of `batches`."""
        count, first = sum(len(target) for _, target in batches), True

        def closure():
            nonlocal first
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for i, (x, target) in enumerate(batches):
                last = i == len(batches) - 1
                with contextlib.nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                    with self.autocast():
                        output = self.forward(x)
                        loss = self.loss(output, target, x) * (len(target) / count)
                    self.scaler.scale(loss).backward()
                total += loss.detach()
                if first:
                    self.sums += _counts(loss.detach() * count, output.detach(), target)
            first = False
            if not self.scaler.is_enabled():
                self._clip()
            return total

        if self.scaler.is_enabled() and self.several_passes:
            self.optimizer.step(closure, self.scaler)
            self.scaler.update()
        elif self.scaler.is_enabled():
            closure()
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step(closure)

    def _clip(self):
        # An optimizer of several passes clips what they add up to.
        if self.clip_grad_norm > 0 and not self.several_passes:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)

    def autocast(self):
        """The mixed-precision context of a forward pass."""
        return torch.autocast(
            self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None
        )

    def evaluate(self, loader):
        """`(loss, accuracy)` of the model in eval mode: mean cross-entropy and the fraction that is right."""
        distributed.broadcast_(self.model.buffers())
        with self.autocast():
            return evaluate(self.model, loader, self.device, self.memory_format)

    def state_dict(self):
        """Everything but the model that the next step depends on; call it on every process."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "sums": distributed.gather(self.sums.cpu()),
            "seconds": self.seconds,
            "best_acc": self.best_acc,
            "best_loss": self.best_loss,
            "random": distributed.gather(checkpoint.random_state()),
        }

    def load_state_dict(self, state):
        """Continues from `state`; raises ValueError when another number of processes wrote it."""
        if len(state["random"]) != distributed.world():
            raise ValueError(
                f"the checkpoint is of {len(state['random'])} processes and this run has "
                f"{distributed.world()}; start as many with torchrun"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.sums, self.seconds = state["sums"][distributed.rank()].to(self.device), state["seconds"]
        self.best_acc, self.best_loss = state["best_acc"], state["best_loss"]
        checkpoint.set_random_state(state["random"][distributed.rank()])


@torch.no_grad()
def evaluate(model, loader, device="cpu", memory_format=torch.contiguous_format):
    """`(loss, accuracy)` over `loader` in eval mode: mean cross-entropy and the fraction of correct predictions.

    Under torch.distributed each process evaluates its loader, and the sums are added up.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, target in loader:
        x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
        output = model(x.contiguous(memory_format=memory_format) if x.dim() == 4 else x)
        loss = torch.nn.functional.cross_entropy(output.float(), target, reduction="sum")
        sums += _counts(loss, output, target)
    model.train(training)
    loss, correct, count = distributed.sum_(sums).tolist()
    return loss / count, correct / count


def _counts(loss, output, target):
    """(loss, correct, images) of a batch, float64; the loss is summed over its images."""
    correct = (output.argmax(1) == target).sum()
    return torch.stack([loss.double(), correct.double(), torch.full_like(loss, len(target)).double()])


class StepTimer:
    """Times steps without making the host wait for the GPU; `median_ms` reads all of them at once."""

    def __init__(self, device):
        self.cuda, self.pairs = device.type == "cuda", []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        self.began = self._now()

    def stop(self):
        self.pairs.append((self.began, self._now()))

    def median_ms(self):
        if self.cuda:
            torch.cuda.synchronize()
        times = [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in self.pairs]
        return statistics.median_high(times) if times else None


class Interrupt:
    """Within this context Ctrl-C and SIGTERM are remembered, not raised; a second Ctrl-C acts at once.

    Calling it tells whether to stop; processes agree, asking each other every 16 calls.
    """

    def __init__(self):
        self.signal, self.calls = None, 0

    def __enter__(self):
        self.old = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_):
        self._restore()

    def _restore(self):
        while self.old:
            signal.signal(*self.old.popitem())

    def _remember(self, number, frame):
        self.signal = number
        self._restore()

    def __call__(self):
        if not distributed.active():
            return self.signal is not None
        self.calls += 1
        if self.calls % 16:
            return False
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return distributed.sum_(torch.tensor(float(self.signal is not None), device=device)).item() > 0


def lr_schedule(name, *, epochs, milestones=(), gamma=0.1, warmup_epochs=0.0):
    """`factor(epoch)` on the learning rate, `epoch` fractional; linear warm-up from 0 over `warmup_epochs` first.

    "cosine": (1 + cos(pi * t)) / 2 with t from 0 to 1 over the epochs after the warm-up;
    "step": gamma ** (number of milestones reached), milestones being fractions of `epochs`; one within 0.05 epochs of
    the start of an epoch is that start, so that 0.3333 of 300 epochs is epoch 100;
    "cosine_steps": the product of both; "constant": 1.

    Raises:
        ValueError: an unknown `name`, `warmup_epochs` outside [0, epochs), or a milestone outside (0, 1).
    """
    names = ("cosine", "cosine_steps", "step", "constant")
    if name not in names:
        raise ValueError(f"schedule: {name!r} is not one of {', '.join(names)}")
    if not 0 <= warmup_epochs < max(epochs, 1e-9):
        raise ValueError(f"warmup_epochs: {warmup_epochs} is not in [0, epochs = {epochs})")
    if not all(0 < m < 1 for m in milestones):
        raise ValueError(f"milestones: {list(milestones)} are not fractions of the epochs, between 0 and 1")
    steps = [m * epochs for m in milestones] if name in ("step", "cosine_steps") else []
    steps = [round(s) if abs(s - round(s)) < 0.05 and 0 < round(s) < epochs else s for s in steps]

    def factor(epoch):
        if epoch < warmup_epochs:
            return epoch / warmup_epochs
        drop = gamma ** sum(epoch >= step for step in steps)
        t = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        return drop * ((1 + math.cos(math.pi * t)) / 2 if name.startswith("cosine") else 1.0)

    return factor
