"""What a run shows and records while it trains: a progress line, `log.jsonl`, optionally TensorBoard."""

import json
import sys
import time
from pathlib import Path

from ..files import write_text

_CLEAR = "\r\x1b[K"  # to the start of the terminal's line, and its end


class RunLog:
    """One JSON object per epoch in `out/log.jsonl`, and the same on the terminal.

    Args:
        out: the run folder.
        epochs: of the whole run.
        start: the first epoch that will be logged; later ones from an earlier attempt are dropped.
        steps: batches per epoch.
        tensorboard: also write event files to `out/tensorboard`.
        quiet: show nothing.
    """

    def __init__(self, out, epochs, start, steps, *, tensorboard=False, quiet=False):
        self.path, self.epochs, self.steps, self.quiet = Path(out) / "log.jsonl", epochs, steps, quiet
        folder = str(Path(out) / "tensorboard")
        self.writer = summary_writer()(folder, purge_step=start) if tensorboard else None
        kept = [line for line in read_log(out) if line["epoch"] < start]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.terminal = sys.stderr.isatty()
        form = "{desc}{bar:30} {n:.1f}/{total} epochs [{elapsed}<{remaining}]{postfix}"
        self.bar = None if quiet else progress_bar(total=epochs, bar_format=form)
        self.shown = time.monotonic()

    def step(self, trainer):
        """Called after each optimizer step; reading the loss waits for the device, so only twice a second."""
        now = time.monotonic()
        if self.quiet or now - self.shown < (0.5 if self.terminal else 30.0):
            return
        self.shown = now
        loss, correct, count = trainer.sums.tolist()
        text = f"loss {loss / count:.3f} acc {correct / count:.1%}"
        if self.bar is not None:
            self.bar.n = round(trainer.epoch + trainer.batch / self.steps, 2)
            self.bar.set_postfix_str(text)
            return
        text = f"epoch {trainer.epoch + 1:>3}/{self.epochs}  step {trainer.batch}/{self.steps}  {text}"
        print(
            _CLEAR + text if self.terminal else text,
            end="" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def epoch(self, record):
        """Appends one epoch's record."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for key in sorted(record.keys() - {"epoch"}):
                self.writer.add_scalar(key, record[key], record["epoch"])
        if self.bar is not None:
            self.bar.n = record["epoch"] + 1
            self.bar.set_postfix_str("")
        self.say(
            f"epoch {record['epoch'] + 1:>3}/{self.epochs}  lr {record['lr']:.2e}  train {record['train_loss']:.4f} "
            f"{record['train_acc']:6.2%}  test {record['test_loss']:.4f} {record['test_acc']:6.2%}  "
            f"step {record['step_ms']:.1f} ms  {record['images_per_s']:.0f} images/s"
        )

    def say(self, text):
        """Prints one line above the progress."""
        if self.bar is not None:
            self.bar.clear()
        elif self.terminal:
            text = _CLEAR + text
        say(text, self.quiet)
        if self.bar is not None:
            self.bar.refresh()

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def say(text, quiet=False):
    """Prints one line to stderr, where progress goes; stdout is for results."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def read_log(out):
    """The records of `out/log.jsonl`; a line that a crash cut short is left out."""
    path, records = Path(out) / "log.jsonl", []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def read_json(path):
    """The object in a JSON file; ValueError names the file where it is damaged or holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def progress_bar(**options):
    """A tqdm bar, or None where stderr is no terminal or there is no tqdm."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(leave=False, **options)


def summary_writer():
    """TensorBoard's class of event files; ImportError names the extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboard: pip install qkernels[tensorboard]") from error
    return SummaryWriter
