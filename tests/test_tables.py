"""The papers' tables: their rows and settings, what is trained for them and only once, and the numbers shown."""

import json
import math
import types

import pytest
from tiny import SHORT

from qkernels import cli
from qkernels.training import load_run, make_config, tables
from qkernels.training.papers import METHODS, TABLES, Row, Table
from qkernels.training.run import Diverged
from qkernels.training.tables import parse_bits

TINY = [
    *SHORT, "--device", "cpu", "--epochs", "1", "--float-epochs", "2", "--set", "lr=0.01", "--set", "batch_size=64",
]  # fmt: skip


def rows_of(name):
    return {row.name: row for table in TABLES[name] for row in table.rows}


def config(row, **more):
    return make_config(**{"recipe": row.recipe, "weight_bits": 2, "act_bits": 4, **row.settings, **more})


def test_every_row_is_a_valid_run():
    for name in TABLES:
        for row in rows_of(name).values():
            assert config(row)["method"], (name, row)
            assert len(rows_of(name)) == len({r.name for r in rows_of(name).values()})


def test_rows_mean_what_they_say():
    noise = {"kind": "FeaturePerturbation", "p": 0.1, "where": "after"}
    found = {name: config(row) for name, row in rows_of("fpq-ablation").items()}
    assert [(bool(found[n]["distill"]), found[n]["quantizer"]["act_noise"]) for n in list(found)[:4]] == [
        (False, "none"), (False, noise), (True, "none"), (True, noise),
    ]  # fmt: skip
    assert [found[f"p = {p}"]["quantizer"]["act_noise"]["p"] for p in (0.3, 1.0)] == [0.3, 1.0]
    assert found["p = 0"] == found["CSD"]
    found = {name: config(row) for name, row in rows_of("nt-noise").items()}
    assert found["c = 0 (LSQ)"]["method"] == "lsq" and found["c = 0 (LSQ)"]["quantizer"] == {
        "weight_noise": "none"
    }
    assert found["c = 0.3"]["quantizer"]["weight_noise"] == {"kind": "Tempering", "c": 0.3, "k": 50.0}
    found = {name: config(row) for name, row in rows_of("saq-cases").items()}
    assert not found["SGD"]["sharpness"] and [found[f"case {c}"]["sharpness"]["case"] for c in (1, 2, 3)] == [
        1,
        2,
        3,
    ]
    assert {f["method"] for f in found.values()} == {"saq"}
    found = {name: config(row) for name, row in rows_of("saq-losses").items()}
    assert not found["VQL"]["sharpness"] and found["PQL"]["sharpness"]["vanilla_loss"] is False
    assert found["VQL + PQL"]["sharpness"]["vanilla_loss"] is True
    found = {name: config(row) for name, row in rows_of("saq-throughput").items()}
    assert [f["sharpness"].get("every") for f in found.values()] == [None, 1, 4]
    assert config(rows_of("saq-rho")["rho = 0.4"])["sharpness"]["rho"] == 0.4
    assert config(rows_of("saq-sam")["SAM, then SGD"])["float_recipe"] == "float_sam"
    assert list(rows_of("methods")) == list(METHODS)


def run(capsys, *argv):
    code = cli.main(["tables", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells_of(text, title):
    """Rows of a Markdown table as lists."""
    body = text[text.index(title) :].split("\n\n")[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]


def test_noise_levels_with_error_and_step(tmp_path, capsys):
    argv = ["nt-noise", *TINY, "--out", tmp_path, "--seeds", 2, "--bits", "2"]
    code, text, err = run(capsys, *argv)
    assert code == 0, err
    lines = cells_of(text, "Noise tempering")
    assert lines[0] == ["", "W2A2", "W2A2 quantization error", "W2A2 step size"]
    assert [line[0] for line in lines[2:]] == ["c = 0 (LSQ)", "c = 0.1", "c = 0.2", "c = 0.3", "c = 0.4"]
    saved = json.loads((tmp_path / "nt-noise.json").read_text())
    rows = saved["tables"]["Noise tempering, tables 4 to 6: noise level"]
    for row, line, short in zip(
        rows, lines[2:], ("lsq", "nt-c0.1", "nt-c0.2", "nt-c0.3", "nt-c0.4"), strict=True
    ):
        results = [
            json.loads((tmp_path / f"{short}_w2a2_s{s}" / "result.json").read_text()) for s in range(2)
        ]
        entry = row["columns"]["W2A2"]
        assert entry["test_acc"] == [r["test_acc"] for r in results]
        mean, deviation = (
            sum(entry["test_acc"]) / 2,
            abs(entry["test_acc"][0] - entry["test_acc"][1]) / math.sqrt(2),
        )
        assert line[1].startswith(f"{100 * mean:.2f} ± {100 * deviation:.2f}")
    changes = [
        a - b for a, b in zip(rows[2]["columns"]["W2A2"]["test_acc"], rows[0]["columns"]["W2A2"]["test_acc"])
    ]
    error = abs(changes[0] - changes[1]) / 2
    assert (
        lines[4][1].endswith(f"({100 * sum(changes) / 2:+.2f} ± {100 * error:.2f})")
        and "(" not in lines[2][1]
    )
    model, _, _ = load_run(tmp_path / "lsq_w2a2_s0")
    inner = [m for m in model.modules() if getattr(getattr(m, "weight_quantizer", None), "bits", 8) == 2]
    steps = [m.weight_quantizer.scale.abs().mean().item() for m in inner]
    extras = json.loads((tmp_path / "lsq_w2a2_s0" / "extras.json").read_text())
    assert inner and extras["step size"] == pytest.approx(sum(steps) / len(steps))
    assert (
        (tmp_path / "nt-noise.md").read_text() == text and "over 2 seeds" in text and "Float models: " in text
    )
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert len(times) == 2 + 5 * 2
    assert run(capsys, *argv)[1] == text
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}


def test_fpq_ablation_shares_runs_between_its_tables(tmp_path, capsys):
    argv = ["fpq-ablation", *TINY, "--out", tmp_path, "--seeds", 1, "--bits", "2/4"]
    code, text, err = run(capsys, *argv)
    assert code == 0, err
    two, three = cells_of(text, "FPQ, table 2"), cells_of(text, "FPQ, table 3")
    assert two[0] == ["", "W2A4"] and len(two) == 2 + 4 and len(three) == 2 + 7
    assert two[4][1].split()[0] == three[2][1] and two[5][1].split()[0] == three[3][1].split()[0]
    assert len(list(tmp_path.glob("*_w2a4_s0/result.json"))) == 4 + 5
    assert "of one seed: it may be chance" in text


def test_saq_cases_show_the_dominant_eigenvalue(tmp_path, capsys):
    argv = ["saq-cases", *TINY, "--out", tmp_path, "--seeds", 1, "--bits", "4"]
    code, text, err = run(capsys, *argv, "--batches", 1)
    assert code == 0, err
    lines = cells_of(text, "SAQ, table 4")
    assert lines[0] == ["", "W4A4", "W4A4 dominant eigenvalue"] and [row[0] for row in lines[2:]][0] == "SGD"
    assert all(float(row[2]) != 0 for row in lines[2:]) and len({row[2] for row in lines[2:]}) == 4
    more = cells_of(run(capsys, *argv, "--batches", 2)[1], "SAQ, table 4")
    assert [row[1] for row in more] == [row[1] for row in lines]
    assert all(row[2] != old[2] for row, old in zip(more[2:], lines[2:]))  # of other batches: measured again


def test_the_rate_is_the_median_of_the_epochs(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(f'{{"images_per_s": {rate}}}\n' for rate in (100, 30, 1)))
    assert tables._images_per_s(tmp_path, None) == 30


def test_throughput_and_sam_start(tmp_path, capsys):
    code, text, _ = run(capsys, "saq-throughput", *TINY, "--out", tmp_path / "a", "--seeds", 1, "--bits", "4")
    lines = cells_of(text, "SAQ, table 6")
    assert code == 0 and [row[0] for row in lines[2:]] == ["SGD", "SAQ without ET", "SAQ with ET"]
    log = json.loads((tmp_path / "a" / "every1_w4a4_s0" / "log.jsonl").read_text())
    assert float(lines[3][2]) == pytest.approx(log["images_per_s"], rel=1e-3)
    code, text, _ = run(capsys, "saq-sam", *TINY, "--out", tmp_path / "b", "--seeds", 1, "--bits", "4")
    assert code == 0 and "SAM, then SGD" in text
    for start, kind in (("float", None), ("float_sam", "sam")):
        found = json.loads((tmp_path / "b" / f"{start}_s0" / "config.json").read_text())
        assert found["sharpness"].get("kind") == kind
    init = json.loads((tmp_path / "b" / "sam-sgd_w4a4_s0" / "config.json").read_text())["init"]
    assert init == str(tmp_path / "b" / "float_sam_s0")
    argv = [
        "methods",
        *TINY,
        "--out",
        tmp_path / "c",
        "--seeds",
        1,
        "--methods",
        "pact,dorefa",
        "--init",
        init,
    ]
    code, text, _ = run(capsys, *argv, "--bits", "4")
    assert code == 0 and [row[0] for row in cells_of(text, "Methods")[2:]] == ["pact", "dorefa"]
    assert not (tmp_path / "c" / "float_s0").exists() and "Float models" not in text


@pytest.mark.parametrize("text, pairs", [("2,4", [(2, 2), (4, 4)]), ("2/4, 8", [(2, 4), (8, 8)])])
def test_bits(text, pairs):
    assert parse_bits(text) == pairs


@pytest.mark.parametrize(
    "argv, message",
    [
        (["methods", "--bits", "two"], "--bits: 'two' is neither a number of bits nor weights/activations"),
        (["methods", "--seeds", "0"], "--seeds: 0 is not a positive number"),
        (["methods", "--methods", "lsk"], "recipe: 'lsk' is neither a .toml file nor one of"),
        (["nt-noise", "--methods", "lsq"], "--methods: 'lsq' is for the table 'methods' alone"),
        (["methods", "--set", "lr"], "--set: 'lr' is not of the form key=value"),
        (["methods", "--set", "schedule=linear"], "schedule: 'linear' is not one of"),
        (["methods", "--device", "cuda:99"], "--device: 'cuda:99' is not there"),
        (["methods", "--set", "seed=3"], "--set: seed is what the cells of this table differ in"),
        (
            ["saq-rho", "--set", "sharpness.rho=3"],
            "--set: sharpness.rho is what the cells of this table differ",
        ),
    ],
)
def test_bad_arguments(tmp_path, capsys, argv, message):
    code, _, err = run(
        capsys, *argv, "--out", tmp_path / "out", "--model", "nin_d1_w1", "--data", "fake:3x8x8:4"
    )
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_a_failed_run_leaves_a_gap(tmp_path, capsys, monkeypatch):
    from qkernels.training import cells

    plain = cells.train

    def training(config, out, **options):
        if config["recipe"] == "dorefa":
            out.mkdir()
            raise Diverged("the training loss became nan")
        return plain(config, out, **options)

    monkeypatch.setattr(cells, "train", training)
    argv = ["methods", *TINY, "--out", tmp_path, "--seeds", 1, "--methods", "lsq,dorefa", "--bits", "4"]
    for _ in range(2):
        code, text, err = run(capsys, *argv)
        assert code == 1 and cells_of(text, "Methods")[3] == ["dorefa", "-"]
        assert "dorefa_w4a4_s0: Diverged: the training loss became nan" in err
    assert "dorefa_w4a4_s0" in json.loads((tmp_path / "methods.json").read_text())["failed"]
    assert tables.footer([], 1).endswith("chance.")
    monkeypatch.setattr(cells, "train", plain)
    code, text, err = run(capsys, *argv, "--retry")
    assert code == 0 and cells_of(text, "Methods")[3][1] != "-" and err == ""


def test_nothing_starts_from_a_float_model_that_is_not_trained(tmp_path, capsys, monkeypatch):
    """Its checkpoint may be there: that of the epochs before the error."""
    from qkernels.training import cells

    plain = cells.train

    def training(config, out, **options):
        result = plain(config, out, **options)
        if out.name == "float_s0":
            (out / "result.json").unlink()
            raise RuntimeError("CUDA error")
        return result

    monkeypatch.setattr(cells, "train", training)
    argv = ["methods", *TINY, "--out", tmp_path, "--seeds", 2, "--methods", "lsq", "--bits", "4"]
    code, _, err = run(capsys, *argv)
    assert code == 1 and (tmp_path / "float_s0" / "checkpoint").exists()
    assert "float_s0: RuntimeError: CUDA error" in err
    assert "lsq_w4a4_s0: its float model float_s0 is not trained" in err and "2 cells are left" in err
    assert (tmp_path / "lsq_w4a4_s1" / "result.json").exists() and not (tmp_path / "lsq_w4a4_s0").exists()


def test_the_standard_error_counts_the_pairs():
    """A seed that only one of the rows has gives no difference."""
    table = Table("", (Row("a", "a", "lsq"), Row("b", "b", "lsq")))
    accuracies = {"a": [0.5, 0.5, None], "b": [0.6, 0.8, 0.9]}
    runs = {(n, (4, 4), s): {"test_acc": v} for n, of in accuracies.items() for s, v in enumerate(of) if v}
    entry = tables._row(table, table.rows[1], [(4, 4)], 3, runs)["columns"]["W4A4"]
    assert tables._accuracy(entry).endswith("(+20.00 ± 10.00)")  # 10 and 30: deviation 14.14, of 2


def test_measurements_are_on_the_device_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "load_run", lambda *args: asked.append(args) or 1 / 0)
    args = types.SimpleNamespace(device="cuda:1", batches=2)
    for column in ("dominant eigenvalue", "step size"):
        with pytest.raises(ZeroDivisionError):
            tables._COLUMNS[column](tmp_path, args)
    assert asked == [(tmp_path, "cuda:1")] * 2
