"""Files that appear whole: a crash or a power cut leaves the former one, and nobody ever reads half of one."""

import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def whole(path):
    """A path to write to, of the same suffix; at the end of the context that file takes the place of `path`."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written")
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder, message):
    """FileExistsError(message) where another process is in this context for the folder; the system forgets the dead."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(message) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def write_text(path, text):
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_object(path):
    """The object in a JSON file; None where it is damaged or holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def json_text(value):
    """ValueError for a NaN or an infinity, which JSON lacks."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path, value):
    write_text(path, json_text(value))
