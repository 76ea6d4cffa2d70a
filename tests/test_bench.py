"""`qkernels bench`: what is timed, written and resumed."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timed import FIELDS, QUICK, needs_native, run, table_of_bars

from qkernels import testing
from qkernels.bench import bars, command, machine, measure, results, rows, suites, train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("tiny_rows")


@needs_native
def test_kernels_suite_end_to_end(capsys, tmp_path):
    files = tmp_path / "out.json", tmp_path / "out.csv"
    argv = ["--suite", "kernels", "--backends", "eager,fn,torch,native,reference", *QUICK]
    code, out, err = run(capsys, "bench", *argv, "--json", files[0], "--csv", files[1])
    assert code == 0, err
    found = json.loads(files[0].read_text())
    assert all({*FIELDS, "machine", "torch", "commit", "date", "allocator"} <= set(r) for r in found)
    assert all(r["torch"] == torch.__version__ and r["device"] == "cpu" for r in found)
    assert {r["backend"] for r in found} == {
        "eager", "fn", "torch", "native", "reference", "copy", "plain", "passes",
    }  # fmt: skip
    assert {r["dtype"] for r in found} == {"float32", "bfloat16"} and {r["threads"] for r in found} == {1}
    cases = {(r["op"], r["case"]) for r in found}
    assert ("fake_quantize", "4x16 token fwd+bwd") in cases and ("quantize", "8x4x3x3 axis0") in cases
    assert ("fake_quantize", "2x4x5x5 tensor tempering fwd+bwd") in cases
    assert ("standardized_distance", "2x4x5x5 fwd+bwd") in cases
    assert all(r["median_ms"] for r in found), [
        (r["backend"], r["parity"]) for r in found if not r["median_ms"]
    ]
    for r in found:
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"], r
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["median_ms"] / 1e6)
        ours = r["backend"] in (*rows.OURS, "passes")
        assert r["parity"] == ("" if r["backend"] in ("copy", "plain") else "equal" if ours else r["parity"])
        assert ours or r["backend"] in ("copy", "plain") or "differ" in r["parity"] or "off" in r["parity"]
        assert r["copy_fraction"] > 0
    native = next(r for r in found if r["backend"] == "native" and r["case"] == "2x4x5x5 tensor fwd+bwd")
    assert native["bytes"] == 5 * 200 * 4
    with open(files[1], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found) and list(lines[0])[: len(FIELDS)] == FIELDS
    assert lines[0]["machine"] == found[0]["machine"] and "clock" in lines[0]
    assert "of copy" in out and "vs rival" in out and "8x4x3x3" in out


@needs_native
def test_csv_is_appended_to_and_a_foreign_one_is_refused(capsys, tmp_path):
    file = tmp_path / "m.csv"
    argv = ["bench", "--backends", "native", *QUICK, "--only", "tempering", "--csv", file]
    assert run(capsys, *argv)[0] == 0
    first = file.read_text().splitlines()
    assert run(capsys, *argv)[0] == 0
    both = file.read_text().splitlines()
    assert both[: len(first)] == first and len(both) == 2 * len(first) - 1
    file.write_text("a,b\n1,2\n")
    code, _, err = run(capsys, *argv)
    assert code == 2 and "has other columns" in err and file.read_text() == "a,b\n1,2\n"


def test_memory_is_counted_exactly():
    x = torch.randn(1000, requires_grad=True)

    def step(inputs):
        y = inputs[0].exp()  # keeps its output
        return torch.autograd.grad(y * 2, inputs, torch.ones(1000))

    variant = measure.Variant("v", step)
    measure.memory(variant, (x,), "cpu")
    assert variant.saved_bytes == 4000
    assert 12000 <= variant.peak_bytes < 24000


@needs_native
def test_a_fake_quantize_keeps_x_alone():
    case = next(testing.timed("weight", "fake_quantize"))
    line = rows.quantizer_row(case, "cpu")
    native, passes = line.variants(["native"])
    for variant in (native, passes):
        measure.memory(variant, line.make(), "cpu")
    assert native.saved_bytes == 8 * 4 * 3 * 3 * 4 + 8 * 4 and passes.saved_bytes == 0


@needs_native
def test_sharpness_suite_end_to_end(capsys, tmp_path):
    out = tmp_path / "new" / "out.csv"
    argv = ["--backends", "eager,foreach,native", *QUICK, "--csv", out]
    code, printed, err = run(capsys, "bench", "--suite", "sharpness", *argv)
    assert code == 0, err
    with open(out, newline="") as file:
        found = {(r["op"], r["backend"]): r for r in csv.DictReader(file)}
    assert {op for op, _ in found} == {"sam_perturb", "perturb_copies"}
    size = sum(4 * p.numel() for p in testing.model_of_list("resnet20").parameters())
    assert int(found["sam_perturb", "native"]["bytes"]) == 4 * size
    assert size <= int(found["sam_perturb", "native"]["peak_bytes"]) < 1.05 * size
    assert found["sam_perturb", "native"]["parity"] == found["sam_perturb", "foreach"]["parity"] == "restored"
    assert found["perturb_copies", "native"]["parity"] == "equal" and "spread" in printed


@needs_native
def test_the_saq_step_beside_the_plain_step():
    settings = type("S", (), {"backends": ["native"], "device": "cpu", "repeats": 1})
    for every, line in zip(train.EVERY, train.saq_steps("cpu", "nin_d2_w1", 4, 8)):
        found = {r["backend"]: r for r in command.time_row(line, 1, settings, settings.backends)}
        assert set(found) == {"native", "plain"} and f"tau {every}" in found["native"]["case"]
        assert found["native"]["parity"].startswith("loss ") and found["native"]["median_ms"] > 0, found


def test_the_bars_of_one_issue_alone():
    found = {issue: [line.name for line in suites.suite("bars", "cpu", issue)] for issue in "abc"}
    assert all("tempering" in name or "distance" in name for name in found["b"])
    assert [name.split()[0] for name in found["c"]] == [
        "sam_perturb",
        "perturb_copies",
        "saq_step",
        "saq_step",
    ]
    assert sum(map(len, found.values())) == len(list(suites.suite("bars", "cpu")))
    text = bars.table(table_of_bars(), issue="a")
    assert "copy of the same bytes" in text and "tempering" not in text and "tempering" in bars.table([])


def test_an_interrupt_that_something_swallows_is_raised_again():
    usual = signal.getsignal(signal.SIGINT)
    with measure.interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            measure.collect([(measure.Variant("v", lambda _: None), [0])], 3, "cpu")
    assert signal.getsignal(signal.SIGINT) is usual
    measure.check_interrupt()


@pytest.mark.parametrize("granularity", ["tensor", "axis0", "axis1", "token", "group"])
def test_the_rivals_agree_with_the_reference_at_every_granularity(granularity):
    case = testing.Case("fake_quantize", (6, 4, 16), torch.float32, granularity, "contiguous", "plain")
    line = rows.quantizer_row(case, "cpu")
    inputs = line.make()
    found = {v.backend: v.step(inputs) for v in line.variants(["eager", "fn", "torch", "reference"])}
    for name in ("eager", "fn", "torch"):
        y, dx, dscale = found[name]
        assert torch.allclose(y, found["reference"][0], atol=1e-6), name
        if name != "torch":  # its gradient looks at the rounded level
            assert torch.allclose(dx, found["reference"][1], atol=1e-6), name
            assert torch.allclose(dscale, found["reference"][2], rtol=1e-4, atol=1e-5), name


@needs_native
def test_a_compiled_rival_is_timed_and_its_fastest_form_is_the_row():
    case = next(testing.timed("weight", "fake_quantize"))
    settings = type("S", (), {"backends": ["compile", "native"], "device": "cpu", "repeats": 2})
    with measure.threads(1):
        found = {
            r["backend"]: r
            for r in command.time_row(rows.quantizer_row(case, "cpu"), 1, settings, settings.backends)
        }
    assert set(found) == {"compile", "native", "passes", "copy"}
    assert found["compile"]["form"] in ("formula", "autograd.Function") and found["compile"]["median_ms"] > 0
    slow, fast = (
        measure.Variant("v", None, "slow", samples=[3.0]),
        measure.Variant("v", None, "fast", samples=[2.0]),
    )
    assert command.fastest([slow, fast]) == {"v": fast} == command.fastest([fast, slow])


@needs_native
def test_the_training_step_is_the_same_work_for_each(tmp_path):
    line = next(train.plain_step("cpu", "nin_d2_w1", 4, 8))
    settings = type("S", (), {"backends": ["eager", "native"], "device": "cpu", "repeats": 2})
    found = {r["backend"]: r for r in command.time_row(line, 1, settings, settings.backends)}
    assert set(found) == {"float", "eager", "native"}
    assert all(r["median_ms"] > 0 and r["peak_bytes"] > 0 for r in found.values()), found
    assert found["eager"]["saved_bytes"] > found["native"]["saved_bytes"] > found["float"]["saved_bytes"]
    assert found["native"]["parity"].startswith("loss 0.0e+00 off, gradients")
    assert "x" in results.cells(list(found.values()))[-1][9]


@needs_native
def test_an_interrupted_run_keeps_its_rows_and_resumes(capsys, monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    argv = ["bench", "--suite", "kernels", "--backends", "native", *QUICK, "--json", out]
    whole, timed = command.time_row, []

    def interrupted(line, *rest):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(line.name)
        return whole(line, *rest)

    monkeypatch.setattr(command, "time_row", interrupted)
    code, printed, err = run(capsys, *argv)
    assert code == 130 and f"stopped; 6 rows are kept; continue with --resume --json {out}" in err
    kept = results.read(out)["rows"]
    assert len(kept) == 6 and kept[0]["case"] in printed
    monkeypatch.setattr(command, "time_row", whole)
    monkeypatch.setattr(machine, "commit", lambda: results.read(out)["run"]["commit"])
    text = out.read_text()
    out.write_text(text.replace(kept[0]["date"], "2020-01-01T00:00:00+00:00"))
    kept = results.read(out)["rows"]
    assert run(capsys, *argv, "--resume")[0] == 0
    after = results.read(out)["rows"]
    assert after[:6] == kept and len({results.key(r) for r in after}) == len(after) > 10
    monkeypatch.setattr(machine, "commit", lambda: "another")
    code, _, err = run(capsys, *argv, "--resume")
    assert code == 2 and "is of commit" in err


@needs_native
def test_resume_times_a_group_again_with_a_backend_that_it_lacks(capsys, monkeypatch, tmp_path):
    """All of them together: only what was timed together is compared. Rows without a form of it stay."""
    out = tmp_path / "out.json"
    argv = ["bench", "--suite", "kernels", "--only", "2x4x5x5 tensor", *QUICK, "--json", out, "--backends"]
    monkeypatch.setattr(machine, "commit", lambda: "one")
    assert run(capsys, *argv, "native,reference")[0] == 0
    before = results.read(out)["rows"]
    code, text, _ = run(capsys, *argv, "torch", "--resume")
    assert code == 0 and "torch" in text
    after = results.read(out)["rows"]
    assert len({results.key(r) for r in after}) == len(after)
    gained = {results.group(r) for r in after if r["backend"] == "torch"}
    assert gained < {results.group(r) for r in before}
    samples = {results.key(r): r["samples_ms"] for r in after}
    for r in before:
        kept = samples[results.key(r)] == r["samples_ms"]
        assert kept == (results.group(r) not in gained), results.label(r)
    assert run(capsys, *argv, "torch,native", "--resume")[0] == 0
    assert samples == {results.key(r): r["samples_ms"] for r in results.read(out)["rows"]}


@needs_native
def test_ctrl_c_in_a_real_process(tmp_path, interrupted_codes):
    out = tmp_path / "out.json"
    argv = [sys.executable, "-m", "qkernels", "bench", "--backends", "native,eager", "--repeats", "100000"]
    process = subprocess.Popen(
        [*argv, "--threads", "1", "--json", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for text in process.stderr:
        if "1 thread" in text:
            break
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in interrupted_codes, err
    assert "stopped before the first row" in err and not out.exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--suite", "kernel"], "argument --suite: invalid choice: 'kernel'"),
        (
            ["--backends", "native,tritn"],
            "--backends: 'tritn' is not one of eager, fn, compile, torch, foreach, pytorch_optimizer, native",
        ),
        (["--backends", ""], "--backends: '' is not one of"),
        (["--backends", "triton", "--device", "cpu"], "--backends: none of triton is there on cpu"),
        (["--threads", "0"], "--threads: '0' is not a list of numbers such as 1,2"),
        (["--threads", "1;2"], "--threads: '1;2' is not a list of numbers"),
        (["--repeats", "0"], "--repeats: 0 is not at least 1"),
        (["--only", "nothing", "--backends", "eager"], "--only: no row of --suite smoke contains 'nothing'"),
        (["--resume"], "--resume: --json names the result to go on with"),
        (["--json", "{tmp}/none/out.json"], "--json: the folder of {tmp}/none/out.json does not exist"),
        (["--show", "{tmp}/none.json"], "{tmp}/none.json: no such file"),
    ],
)
def test_bad_arguments(capsys, tmp_path, argv, message):
    code, out, err = run(capsys, "bench", *(word.format(tmp=tmp_path) for word in argv))
    assert code == 2 and out == "" and message.format(tmp=tmp_path) in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu(capsys):
    code, _, err = run(capsys, "bench", "--device", "cuda")
    assert code == 2 and "--device: cuda was asked for, but this torch sees no GPU" in err


def test_a_suite_without_rows_says_so(capsys, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "sharpness", ())
    code, out, err = run(capsys, "bench", "--suite", "sharpness", "--backends", "eager", *QUICK)
    assert (code, out) == (0, "") and "--suite sharpness: this installation has no such rows" in err


def test_freed_memory_is_kept():
    if sys.platform != "linux":
        pytest.skip("mallopt is glibc's")
    code = (
        "import resource, torch\nfrom qkernels.bench import measure\ntorch.set_num_threads(1)\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "x = torch.zeros(4 << 20)\n"
        "with measure.kept_memory() as kind:\n"
        "    measure.touch(256 << 20)\n"
        "    before = faults()\n"
        "    for _ in range(5): x + 1\n"
        "    print(kind, faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    kind, count = done.stdout.split()
    assert kind == "kept" and int(count) < 1000, done.stderr
