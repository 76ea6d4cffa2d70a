"""Results of benchmarks: `qkernels compare`, ratios, bars and tables."""

import pytest
from timed import row, run, table_of_bars, write

from qkernels.bench import bars, results


@pytest.mark.parametrize(
    "changes, code, text",
    [
        ({}, 0, "no row of ours is slower"),
        ({"median_ms": 1.04, "p20_ms": 1.06}, 0, "no row of ours is slower"),
        ({"median_ms": 1.2, "p20_ms": 1.0}, 0, "slower, spreads overlap"),
        ({"median_ms": 1.2, "p20_ms": 1.1}, 1, "FAIL: slower by 20%"),
        ({"median_ms": None, "p20_ms": None, "parity": "REFUSED: y"}, 1, "FAIL: REFUSED: y"),
        ({"median_ms": 0.5, "p20_ms": 0.4}, 0, "0.500"),
    ],
)
def test_compare_exit_codes(capsys, tmp_path, changes, code, text):
    base = write(tmp_path / "base.json", row(), row(backend="eager"))
    new = write(tmp_path / "new.json", row(**changes), row(backend="eager", median_ms=9.0, p20_ms=8.0))
    got, out, _ = run(capsys, "compare", base, new, "--fail-over", "5%")
    assert got == code and text in out and "slower (a rival)" in out
    assert run(capsys, "compare", base, new)[0] == 0


def test_compare_lists_rows_of_one_side_and_other_machines(capsys, tmp_path):
    base = write(tmp_path / "base.json", row(), row(threads=2))
    new = write(tmp_path / "new.json", row(), row(dtype="bfloat16"), machine="other")
    code, out, _ = run(capsys, "compare", base, new, "--fail-over", "5")
    assert code == 0 and "note: machine differs: m and other" in out
    assert f"only in {base}: fake_quantize 64x64x28x28 tensor fwd+bwd float32 2t native" in out
    assert f"only in {new}: fake_quantize 64x64x28x28 tensor fwd+bwd bfloat16 1t native" in out


def test_compare_refuses_what_is_not_a_result(capsys, tmp_path):
    good, bad = write(tmp_path / "good.json", row()), tmp_path / "bad.json"
    for text, message in (
        ("{", "not a result of qkernels bench"),
        ("[{}]", "a row lacks op"),
        ('{"rows": []}', "not a list of rows"),
    ):
        bad.write_text(text)
        code, _, err = run(capsys, "compare", good, bad)
        assert code == 2 and message in err and str(bad) in err
    other = write(tmp_path / "other.json", row(threads=7))
    assert "no row in common" in run(capsys, "compare", good, other)[2]
    assert "no such file" in run(capsys, "compare", good, tmp_path / "none.json")[2]
    code, _, err = run(capsys, "compare", good, good, "--fail-over", "some")
    assert code == 2 and "argument --fail-over: 'some' is not a percentage such as 5%" in err


def test_ratios_are_paired_by_round():
    slow, fast = row(samples_ms=[2.0, 4.0, 30.0]), row(samples_ms=[1.0, 2.0, 10.0], median_ms=2.0)
    assert results.ratio(fast, slow) == 2.0
    assert results.ratio(row(median_ms=2.0), row(median_ms=6.0)) == 3.0
    assert results.ratio(row(), row(median_ms=None)) is None


def test_bars_take_the_worst_row_and_fail_openly():
    good = {
        bar.what: (value, bar.holds(value))
        for bar, value, _, _ in bars.judge(table_of_bars())
        if value is not None
    }
    assert good["fwd+bwd over a copy of the same bytes, large, float32"] == (1.2, True)
    assert good["faster than PyTorch's learnable op, large, float32"][0] == pytest.approx(7 / 1.2)
    assert good["training step over the float step"] == (1.15, True)
    assert good["saved bytes of a training step over float"] == (1.5, True)
    assert good["saved for backward over x"][1] and bars.met(table_of_bars())
    slow = table_of_bars() + [row(threads=2, median_ms=1.4), row(threads=2, backend="copy")]
    assert not bars.met(slow)
    line = next(text for text in bars.table(slow).splitlines() if "over a copy" in text and "float32" in text)
    assert "1.40x" in line and "FAIL" in line and "2t" in line
    assert "not measured" in bars.table(slow)
    assert not bars.met(table_of_bars(saved_bytes=2 * 64225280 // 5))
    alone = {
        bar.what: value
        for bar, value, _, _ in bars.judge(table_of_bars() + [row(backend="passes", median_ms=1.1)])
    }
    assert alone["the passes alone, outputs reused, over a copy, float32"] == 1.1
    assert alone["fwd+bwd over a copy of the same bytes, large, float32"] == 1.2


def test_show_prints_markdown(capsys, tmp_path):
    code, out, _ = run(capsys, "bench", "--show", write(tmp_path / "r.json", *table_of_bars()), "--markdown")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("| row | backend | ms |") and set(lines[1]) <= set("|- ")
    assert any("| pass |" in text for text in lines)
