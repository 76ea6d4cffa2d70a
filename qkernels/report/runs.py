"""The runs of a report: what is in their folders, and which of them differ in the seed alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..files import read_object
from ..training.log import read_log

_APART = ("seed", "versions", "init", "summary")  # in which runs of one group may differ; init by seed alone
_SHOWN = ("recipe", "model", "data", "weight_bits", "act_bits")  # have columns of their own


@dataclass
class Run:
    """One run folder. result is None while it trains; measures is what `qkernels measure` found, or {}."""

    path: Path
    config: dict
    result: dict | None
    log: list
    measures: dict


@dataclass
class Group:
    """Runs that differ in the seed alone.

    config: theirs; without `init` where each seed has float weights of its own. note: the settings that tell it from
    groups of the same label.
    """

    config: dict
    runs: list
    note: str = ""
    label: str = field(init=False, default="")

    @property
    def bits(self):
        names = [{32: "FP32"}.get(self.config[key], str(self.config[key])) for key in _SHOWN[3:]]
        return "FP32" if names == ["FP32", "FP32"] else "W{}A{}".format(*names).replace("FP32", "32")

    def values(self, *keys):
        """Numbers of the finished runs' results."""
        found = [run.result[key] for run in self.runs if run.result for key in keys]
        return [value for value in found if value is not None]

    def gaps(self):
        """Test loss - training loss of the finished runs."""
        return [run.result["test_loss"] - run.result["train_loss"] for run in self.runs if run.result]

    def measured(self, *keys):
        """The values at measures[key][key]..., of the runs that have one."""
        found = []
        for run in self.runs:
            value = run.measures
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.append(value)
        return found


def find_runs(folders):
    """The runs in `folders`, in order; a folder that is no run is searched for runs, other files are passed over."""
    found, folders = {}, [folders] if isinstance(folders, (str, Path)) else list(folders)
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"runs: {folder} does not exist")
        inside = [folder] if (folder / "config.json").is_file() else _below(folder)
        found.update((run.resolve(), run) for run in inside)
    if not found:
        raise ValueError(f"runs: no run folder (one with config.json) in {', '.join(map(str, folders))}")
    return [_read_run(path) for path in found.values()]


def _below(folder):
    """Run folders below `folder`, without the float runs inside of runs."""
    paths = [path.parent for path in sorted(folder.rglob("config.json"))] if folder.is_dir() else []
    return [path for path in paths if not any((above / "config.json").is_file() for above in path.parents)]


def _read_run(path):
    config = _found(path / "config.json")
    if config is None or any(key not in config for key in (*_SHOWN, "seed", "epochs")):
        raise ValueError(f"runs: {path / 'config.json'} is not the config of a run")
    result, measures = _found(path / "result.json"), _found(path / "measures.json") or {}
    return Run(path, config, result, read_log(path), measures)


def _found(path):
    return read_object(path) if path.exists() else None


def group_runs(runs):
    """Groups in order of data, model, recipe and falling precision, each with a label of its own."""
    alike = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k not in _APART}, sort_keys=True)
        alike.setdefault(key, []).append(run)
    found = [group for members in alike.values() for group in _groups(members)]
    for group in found:
        twins = [g for g in found if all(g.config[key] == group.config[key] for key in _SHOWN)]
        group.note = _differences(group, twins)
        group.label = " ".join(filter(None, (group.config["recipe"], group.bits, group.note)))
        group.runs.sort(key=lambda run: run.config["seed"])
    order = ("data", "model")
    return sorted(
        found,
        key=lambda g: (
            *(g.config[key] for key in order),
            g.config["recipe"] != "float",
            g.config["recipe"],
            -g.config["weight_bits"],
            -g.config["act_bits"],
            g.note,
        ),
    )


def _groups(runs):
    """One group, or where a seed has runs from several float weights, one for each of these."""
    starts = {}
    for run in runs:
        starts.setdefault(run.config.get("init"), []).append(run)
    pairs = {(run.config["seed"], run.config.get("init")) for run in runs}
    if len(pairs) > len({seed for seed, _ in pairs}):
        return [Group(members[0].config, members) for members in starts.values()]
    return [Group({k: v for k, v in runs[0].config.items() if k != "init"}, runs)]


def _differences(group, twins):
    """ "lr 0.1, sharpness.case 2": the settings in which these groups differ."""
    flat = [dict(_flat(g.config)) for g in twins]
    own = dict(_flat(group.config))
    keys = [key for key in {k: None for f in flat for k in f} if len({repr(f.get(key)) for f in flat}) > 1]
    return ", ".join(f"{key} {own[key]}" for key in keys if key in own)


def _flat(config, prefix=""):
    for key, value in config.items():
        if prefix == "" and key in (*_APART, *_SHOWN) and key != "init":
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
