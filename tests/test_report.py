"""The report: what its tables say over runs and seeds, that it needs no other file, and errors."""

import json
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qkernels import cli
from qkernels.report import charts, write_report
from qkernels.report.runs import find_runs, group_runs
from qkernels.tabulate import spread

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "br", "circle", "line", "rect", "polyline", "link", "input"}


class Page(HTMLParser):
    """Tables as lists of rows of cells, headings, addresses; and every tag closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.headings, self.addresses, self.classes = [], [], [], [], {}
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = attributes.get("class", "")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
            self.classes[(len(self.tables) - 1, data)] = self.cell
        elif self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


def make_run(path, recipe="lsq", bits=4, seed=0, acc=0.9, finished=True, measures=None, **settings):
    """A run folder as `qkernels train` leaves it."""
    path.mkdir(parents=True)
    config = {"recipe": recipe, "model": "resnet20", "data": "digits", "weight_bits": bits, "act_bits": bits}
    config |= {"seed": seed, "epochs": 2, "lr": 0.1, "versions": {"qkernels": "1", "torch": "2"}, **settings}
    (path / "config.json").write_text(json.dumps(config))
    lines = [
        {"epoch": e, "train_loss": 1.0 - e / 2, "test_loss": 1.2 - e / 2, "train_acc": 0.5, "test_acc": 0.4}
        for e in range(2)
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {
            **config,
            "train_loss": 0.25,
            "train_acc": 0.95,
            "test_loss": 0.5,
            "test_acc": acc,
            "seconds": 60,
        }
        (path / "result.json").write_text(json.dumps({**result, "step_ms": 10 + seed}))
    if measures:
        (path / "measures.json").write_text(json.dumps(measures))
    return path


def measured(scale, bits=4):
    names = [
        f"{b}_{m}{r}" for b in ("pac_bayes", "sharpness") for m in ("", "mag_") for r in ("init", "orig")
    ]
    step = None if bits == 32 else scale / 100
    cell = {"loss": 1.0, "acc": 0.5, "gap": scale, "accuracy_gap": 0.1}
    layer = {
        "name": "conv",
        "weight_bits": bits,
        "weight_norm": 3.0,
        "weight_step": step,
        "mean_error": step,
    }
    return {
        "generalization": {"corrupted": {"fog": {"1": cell, "5": cell}}, "mean": {"1": cell, "5": cell, "all": cell}},
        "layers": [layer, {**layer, "weight_norm": 4.0}],
        "bounds_latent": {"measures": {name: scale + i for i, name in enumerate(names)}},
        "linf_latent": {"0.001": {"difference": scale / 10, "keskar": 1.0}},
        "hessian_latent": {"eigenvalues": [10 * scale, 1.0], "trace": 50 * scale, "trace_stderr": scale},
    }  # fmt: skip


def png():
    """The smallest picture: one pixel."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
    )


def test_seeds_are_one_row_with_mean_and_spread(tmp_path):
    for seed, acc in enumerate((0.90, 0.92, 0.97)):
        make_run(tmp_path / f"q{seed}", seed=seed, acc=acc, init=f"float{seed}", summary=f"{seed}")
    make_run(tmp_path / "f", recipe="float", bits=32, acc=0.99)
    page = Page(write_report([tmp_path], tmp_path / "page" / "report.html"))
    header, first, second = page.tables[0]
    assert header == ["Recipe", "Model", "Data", "Seeds", "Test acc %", "Train acc %", "Test loss", "Train loss", "Gap",
                      "Step ms"]  # fmt: skip
    assert first == [
        "float FP32",
        "resnet20",
        "digits",
        "1",
        "99.00",
        "95.00",
        "0.500",
        "0.250",
        "0.250",
        "10.0",
    ]
    assert second[0] == "lsq W4A4" and second[3] == "3" and second[4] == "93.00 ± 3.61"
    assert second[8:] == ["0.250 ± 0.000", "11.0 ± 1.0"]
    assert len(page.tables[-1]) == 5 and page.tables[-1][1][7] == "0.2500"  # every run, by itself: its gap
    assert page.headings == ["Training runs", "Results", "Training of resnet20 on digits"]


def test_groups_of_one_label_are_told_apart_by_their_settings(tmp_path):
    for i, lr in enumerate((0.1, 0.05)):
        make_run(tmp_path / str(i), lr=lr, sharpness={"case": i + 1})
    groups = group_runs(find_runs([tmp_path]))
    assert [group.note for group in groups] == ["lr 0.05, sharpness.case 2", "lr 0.1, sharpness.case 1"]
    page = Page(write_report(str(tmp_path), tmp_path / "r.html"))
    assert page.tables[0][0][3] == "Settings" and page.tables[0][1][3] == "lr 0.05, sharpness.case 2"


def test_runs_of_other_quantizers_are_other_groups(tmp_path):
    for seed, axis in enumerate((0, "none")):
        make_run(tmp_path / str(seed), seed=seed, quantizer={"weight_axis": axis})
    assert len(group_runs(find_runs([tmp_path]))) == 2


def test_curves_are_the_means_of_the_runs_there_are_and_dashed_in_training(tmp_path, monkeypatch):
    for seed, losses in enumerate(([1.0, 0.5], [2.0])):
        path = make_run(tmp_path / str(seed), seed=seed) / "log.jsonl"
        lines = [{"epoch": e, "train_loss": v, "test_loss": v + 1} for e, v in enumerate(losses)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, line_chart = [], charts.line_chart
    monkeypatch.setattr(charts, "line_chart", lambda *args: (drawn.append(args[0]), line_chart(*args))[1])
    write_report([tmp_path], tmp_path / "r.html")
    assert drawn[0] == [(0, True, [(1, 1.5), (2, 0.5)]), (0, False, [(1, 2.5), (2, 1.5)])]


def test_other_float_weights_are_no_other_seed(tmp_path):
    """Once a seed has runs from two, each of them is a row of its own, with the name of its weights."""
    for i, (seed, init) in enumerate(((0, "a"), (1, "a"), (0, "b"), (0, None))):
        make_run(tmp_path / f"r{i}", seed=seed, init=init)
    groups = group_runs(find_runs([tmp_path]))
    found = {group.note: [run.config["seed"] for run in group.runs] for group in groups}
    assert found == {"init a": [0, 1], "init b": [0], "init None": [0]}


def test_an_unfinished_run_is_shown_as_such(tmp_path):
    make_run(tmp_path / "a", finished=False)
    page = Page(write_report([tmp_path / "a"], tmp_path / "r.html"))
    assert page.tables[0][1][3:] == ["unfinished", "", "", "", "", "", ""]
    assert page.tables[-1][1][4] == "2 of 2" and "1 run; 1 unfinished" in page.source
    assert page.source.count("<polyline") == 4  # two curves in each of two plots
    make_run(tmp_path / "b", distill={"kind": "features"})
    page = Page(write_report([tmp_path / "b"], tmp_path / "r.html"))
    assert page.source.count("<polyline") == 3  # its training loss has further terms


def test_measures_tables_and_pictures(tmp_path):
    make_run(tmp_path / "f", recipe="float", bits=32, measures=measured(1.0, 32))
    for seed in range(2):
        make_run(tmp_path / f"q{seed}", seed=seed, measures=measured(0.5 + seed / 10))
    saddle = measured(2.0)
    saddle["hessian_latent"]["eigenvalues"][0] = -20.0
    make_run(tmp_path / "w", bits=2, measures=saddle)
    (tmp_path / "w" / "landscape_quantized.png").write_bytes(png())
    page = Page(write_report([tmp_path], tmp_path / "r.html"))
    bounds = next(t for t in page.tables if "PAC-Bayes" in t[0])
    assert bounds[1][1:] == ["Init", "Orig", "Mag-Init", "Mag-Orig"] * 2
    assert bounds[2:] == [
        ["float FP32", *(f"{1 + i:.3f}" for i in range(8))],
        ["lsq W4A4", *(f"{0.55 + i:.3f}" for i in range(8))],
        ["lsq W2A2", *(f"{2 + i:.3f}" for i in range(8))],
    ]
    number = page.tables.index(bounds)
    assert page.classes[(number, "0.550")] == "best" and page.classes[(number, "2.000")] == ""
    curvature = page.tables[number + 1]
    assert curvature[0] == ["", "λ₁", "Trace", "L∞, ρ = 0.001"]
    assert curvature[2] == ["lsq W4A4", "5.500", "27.500 ± 0.550", "0.055"]
    assert page.classes[(number + 1, "5.500")] == "best", "not -20"
    layers = page.tables[number + 2]
    assert layers[2] == ["lsq W4A4", "5.000", "0.0055", "0.0055"] and layers[1] == [
        "float FP32",
        "5.000",
        "",
        "",
    ]
    corrupted = page.tables[number + 3]
    assert corrupted[0] == ["", "Severity 1", "Severity 5"] and [row[0] for row in corrupted[2:]] == [
        "fog",
        "mean",
    ]
    assert corrupted[2][1:4] == ["1.000", "0.550", "2.000"]
    classes = [page.classes[(number + 3, text)] for text in corrupted[2][1:4]]
    assert classes == ["", "good", "bad"]
    assert "lsq W2A2, seed 0, quantized" in page.source


def test_without_a_float_run_nothing_is_coloured(tmp_path):
    for bits in (4, 2):
        make_run(tmp_path / str(bits), bits=bits, measures=measured(8.0 / bits))
    assert not {"good", "bad"} & set(Page(write_report([tmp_path], tmp_path / "r.html")).classes.values())


def test_the_float_models_row_stands_in_the_tables_of_quantized_weights(tmp_path):
    def quantized(found):
        return found | {
            key.replace("latent", "quantized"): found[key] for key in list(found) if "latent" in key
        }

    make_run(tmp_path / "f", recipe="float", bits=32, measures=measured(1.0, 32))
    make_run(tmp_path / "q", measures=quantized(measured(0.5)))
    page = Page(write_report([tmp_path], tmp_path / "r.html"))
    for first in ("PAC-Bayes", "λ₁"):
        tables = [t for t in page.tables if first in t[0]]
        assert len(tables) == 2
        assert [row[0] for row in tables[1] if "FP32" in row[0] or "W4A4" in row[0]] == [
            "float FP32",
            "lsq W4A4",
        ]
    (tmp_path / "q" / "measures.json").write_text(json.dumps(measured(0.5)))
    page = Page(write_report([tmp_path], tmp_path / "r.html"))
    assert len([t for t in page.tables if "PAC-Bayes" in t[0]]) == 1


def test_the_page_needs_no_other_file_and_escapes_text(tmp_path):
    make_run(tmp_path / "a", recipe="<script>alert(1)</script>", measures=measured(1.0))
    (tmp_path / "a" / "landscape.png").write_bytes(png())
    page = Page(write_report([tmp_path / "a"], tmp_path / "r.html", title="a & <b>"))
    assert "<script" not in page.source and "a &amp; &lt;b&gt;" in page.source
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in page.source and "url(" not in page.source
    assert 'name="viewport"' in page.source and "prefers-color-scheme: dark" in page.source
    assert all(f"--c{i}:" in page.source for i in range(charts.COLOURS))


def test_damaged_files_do_not_stop_the_page(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "measures.json").write_text('{"layers": ')
    with open(run / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "tr')
    assert Page(write_report([run], tmp_path / "r.html")).tables[0][1][0] == "lsq W4A4"


def test_which_folders_are_runs(tmp_path):
    run = make_run(tmp_path / "grid" / "a")
    make_run(run / "float", recipe="float", bits=32)
    (tmp_path / "grid" / "notes.txt").write_text("x")
    found = find_runs([tmp_path / "grid", run, tmp_path / "grid" / "notes.txt"])
    assert [r.path for r in found] == [run]
    with pytest.raises(ValueError, match="runs: no run folder .one with config.json. in .*notes.txt"):
        find_runs([tmp_path / "grid" / "notes.txt"])
    with pytest.raises(FileNotFoundError, match="runs: .*absent does not exist"):
        find_runs([tmp_path / "absent"])
    (run / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not the config of a run"):
        find_runs([run])


def test_spread():
    assert spread([]) == (None, None) and spread([2.0]) == (2.0, None)
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-9, 3e-9], [-1e7, 1e7], [0.91, 0.93]])
def test_axes_have_round_ticks_that_tell_values_apart(values):
    axis = charts._Axis(min(values), max(values))
    ticks = list(axis.ticks())
    assert 2 <= len(ticks) <= 8 and len({text for _, text in ticks}) == len(ticks)
    assert (
        all(axis.low <= at <= axis.high for at, _ in ticks)
        and axis.low < min(values) <= max(values) < axis.high
    )


def test_charts_leave_out_what_is_not_finite():
    svg = charts.line_chart([(0, False, [(0, 1.0), (1, float("nan")), (2, None), (3, 2.0)])], "x", "y", "t")
    assert len(re.search(r'<polyline[^>]* points="([^"]*)"', svg)[1].split()) == 2
    assert charts.line_chart([(0, False, [(0, None)])], "x", "y", "t") == charts.dot_chart([], "x", "t") == ""


def test_bars_are_one_sample_deviation_long():
    svg = charts.dot_chart([("a", 0, [1.0, 2.0, 3.0])], "x", "t")
    first, _, last = (float(x) for x in re.findall(r'<circle cx="([^"]*)"', svg))
    left, width = map(float, re.search(r'<rect x="([^"]*)" y="[^"]*" width="([^"]*)"', svg).groups())
    assert (left, width) == pytest.approx((first, last - first), abs=0.15)


def test_the_command(tmp_path, capsys):
    make_run(tmp_path / "a")
    assert (
        cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html"), "--title", "Mine"]) == 0
    )
    assert f"report: {tmp_path / 'r.html'}" in capsys.readouterr().out
    assert Page(tmp_path / "r.html").headings[0] == "Mine"
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder, where a file is to be written" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "absent"), "--out", str(tmp_path / "x.html")]) == 2
    assert "absent does not exist" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_without_plotting_packages(tmp_path):
    """The page draws its own plots: matplotlib is not needed."""
    make_run(tmp_path / "a")
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from qkernels.report import write_report; write_report([sys.argv[1]], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "<polyline" in (tmp_path / "r.html").read_text()


def test_figures_of_noise_gradients_and_the_trace(tmp_path):
    found = {
        "output_variance": {
            "levels": [0.01, 0.1, 1.0],
            "variance": {n: {"output": [1e-4, 1e-2, v]} for n, v in (("quantized", None), ("float", 1.0))},
        },
        "gradient_norms": {"mean": {"none": 1.25, "weights": 2.0, "features": None}},
        "gradient_cosine": {
            "cosine": [0.5, None, 0.75],
            "mean": 0.625,
            "settings": {"rho": 0.3, "case": 3},
        },
        "hessian_trace": {"runs": {"run": {"epochs": [0, 2], "trace": [-3.0, 40.0]}}},
    }
    make_run(tmp_path / "f", recipe="float", bits=32)
    make_run(tmp_path / "a", measures={"figures": found})
    only = {"gradient_cosine": {**found["gradient_cosine"], "cosine": [0.6], "mean": 0.6}}
    make_run(tmp_path / "b", seed=1, measures={"figures": only})
    path = write_report([tmp_path], tmp_path / "report.html")
    page, text = Page(path), path.read_text()
    header, row = next(t for t in page.tables if "cos(gₛ, g)" in t[0])
    assert header == ["", "‖g‖", "noise on weights", "noise on features", "cos(gₛ, g)", "Perturbed by"]
    assert row == ["lsq W4A4", "1.250", "2.000", "", "0.613 ± 0.018", "ρ = 0.3, SAQ case 3"]
    plots = {name: text.count(f'aria-label="{name}') for name in ("Output variance", "Cosine", "Trace")}
    assert plots == {"Output variance": 1, "Cosine": 1, "Trace": 1}
    # The group has the colour it has in the training curves, and what is missing or has no logarithm is no point.
    lines = {name: _lines(text, name) for name in plots}
    assert [len(points) for points in lines["Output variance"]] == [2, 3]
    assert [len(points) for points in lines["Cosine"]] == [2]
    assert [len(points) for points in lines["Trace"]] == [1]
    assert "var(--c1)" in text.partition('aria-label="Cosine')[2].partition("</svg>")[0]


def _lines(text, name):
    svg = text.partition(f'aria-label="{name}')[2].partition("</svg>")[0]
    return [points.split() for points in re.findall(r'points="([^"]*)"', svg)]
