"""The `qkernels` command. Each sub-command is a module with `add_arguments(parser)` and `main(args) -> exit code`."""

import argparse
import importlib
import os
import sys

from . import __version__

COMMANDS = {
    "doctor": ("qkernels.doctor", "what is built, what runs where, and why not"),
    "train": ("qkernels.training.run", "train a model by a recipe, in floating point or quantized"),
    "measure": (
        "qkernels.sharpness.measure_command",
        "sharpness measures, Hessian and pictures of a trained run",
    ),
    "report": ("qkernels.report", "one HTML page of tables and plots over runs"),
    "bench": ("qkernels.bench.command", "time the kernels against their rivals"),
    "compare": ("qkernels.bench.compare", "compare two benchmark results"),
    "sweep": ("qkernels.sweep", "train a resumable grid of runs"),
    "export": ("qkernels.export", "write a trained run as an ONNX or torch program"),
    "tables": ("qkernels.training.tables", "the tables of the papers, from recipes and runs"),
    "demo": ("qkernels.training.demo", "train float, 4-bit and 2-bit on digits, and write a report"),
}
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


class Parser(argparse.ArgumentParser):
    """Reports bad arguments as the rest of the command does: one line, exit code 2."""

    def error(self, message):
        print(f"qkernels: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv=None):
    """Runs one command; returns 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse(argv)
        return args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (*BAD_INPUT, RuntimeError, ImportError, OSError)):
            return _fail(text, 2 if isinstance(error, BAD_INPUT) else 1)
        return _fail(f"{type(error).__name__}: {text} (--debug shows where)", 1)


def parse(argv):
    """The parsed arguments, with `run` the function of the command; only that command's module is imported."""
    parser = Parser(prog="qkernels", description="Fused kernels for quantization-aware training.")
    parser.add_argument("--version", action="version", version=f"qkernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True, parser_class=Parser)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == chosen:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.main)
    return parser.parse_args(argv)


def _fail(message, code):
    print(f"qkernels: error: {message}", file=sys.stderr)
    return code
