"""What `qkernels bench` refuses to time: implementations and rivals that compute something else."""

import pytest
import torch
from timed import QUICK, needs_native, run

from qkernels import backend, eager, testing
from qkernels.bench import distance, lists, measure, results, rows, suites, train

pytestmark = pytest.mark.usefixtures("tiny_rows")


@needs_native
def test_a_perturbation_that_is_off_or_not_taken_back_is_refused():
    line = next(lists.perturbed("cpu"))
    loop = next(v for v in line.variants(["eager"]))
    assert line.check(loop) == "restored"
    right = loop.step.perturb
    loop.step.perturb = lambda: (right(), line.make()[0][0].data.mul_(1.01))
    with pytest.raises(rows.Refused, match="moves are off by"):
        line.check(loop)
    loop.step.perturb, loop.step.restore = right, lambda: None
    with pytest.raises(rows.Refused, match="restored weights differ"):
        line.check(loop)


@needs_native
def test_a_rival_of_the_distance_that_computes_something_else_is_refused():
    line = next(distance.suite("cpu"))
    found = {v.backend: v for v in line.variants(["eager", "torch", "native"])}
    assert line.check(found["native"]) == "equal" and "off" in line.check(found["torch"])
    step = found["eager"].step
    found["eager"].step = lambda inputs: (1.01 * step(inputs)[0], step(inputs)[1])
    with pytest.raises(rows.Refused, match="loss or gradient 1.0e-02 off, at most 0.001 may"):
        line.check(found["eager"])


def wrong_element(result):
    result.view(-1)[3] += 1e-6
    return result


@needs_native
@pytest.mark.parametrize(
    "where, op",
    [("y", "fake_quantize"), ("dx", "fake_quantize_backward"), ("dscale", "fake_quantize_backward")],
)
def test_a_wrong_implementation_is_refused_and_not_timed(capsys, monkeypatch, tmp_path, where, op):
    right = backend.op

    def planted(name):
        def call(*args):
            result = right(name)(*args)
            if name != op:
                return result
            if where == "y":
                return wrong_element(result)
            dx, dscale, doffset = result
            return (wrong_element(dx), dscale, doffset) if where == "dx" else (dx, dscale * 1.01, doffset)

        return call

    monkeypatch.setattr(backend, "op", planted)
    monkeypatch.setattr(eager, "library", None)  # which asks the dispatcher itself
    out = tmp_path / "out.json"
    code, printed, err = run(
        capsys, "bench", "--backends", "eager,native", *QUICK, "--only", "axis0 fwd", "--json", out
    )
    found = {r["backend"]: r for r in results.read(out)["rows"]}
    assert code == 1 and "refused: fake_quantize 8x4x3x3 axis0 fwd+bwd float32 1t native" in err
    assert found["native"]["median_ms"] is None and found["native"]["parity"].startswith(
        "REFUSED: differs from"
    )
    assert {"y": "output 0", "dx": "output 0", "dscale": "output 1"}[where] in found["native"]["parity"]
    assert found["eager"]["median_ms"] > 0 and "REFUSED" in printed


def test_an_implementation_that_does_not_answer_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "serves", lambda op, device: "reference")
    line = rows.quantizer_row(next(testing.timed("weight", "fake_quantize")), "cpu")
    native = measure.Variant("native", None)
    with pytest.raises(rows.Refused, match="fake_quantize on cpu is answered by reference"):
        line.check(native)


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    line = rows.quantizer_row(next(testing.timed("activation", "fake_quantize")), "cpu")
    eager = next(v for v in line.variants(["eager"]))
    assert line.check(eager) == "y 0.00%, dx 0.00% differ"
    step = eager.step
    eager.step = lambda inputs: (step(inputs)[0] + 0.1, *step(inputs)[1:])
    with pytest.raises(rows.Refused, match=r"y 100.00%, dx 0.00% differ, at most 5% may"):
        line.check(eager)


@pytest.mark.parametrize("option", suites.NOISY)
def test_a_rivals_noise_has_the_right_size(option):
    case = testing.Case("fake_quantize", (64, 256), torch.float32, "tensor", "contiguous", option)
    line = rows.quantizer_row(case, "cpu")
    checked = {v.backend: v for v in line.variants(["eager", "fn"])}
    for variant in checked.values():
        assert "noise" in line.check(variant)
    step = checked["eager"].step
    checked["eager"].step = lambda inputs: (2 * step(inputs)[0], *step(inputs)[1:])
    with pytest.raises(rows.Refused, match="at most 13%"):
        line.check(checked["eager"])


@needs_native
def test_a_training_step_with_other_gradients_is_refused():
    line = next(train.plain_step("cpu", "nin_d2_w1", 4, 8))
    native = next(v for v in line.variants(["native"]) if v.backend == "native")
    step = native.step

    def wrong(batch):
        loss, gradients = step(batch)
        return loss, [1.001 * g for g in gradients]

    native.step = wrong
    with pytest.raises(rows.Refused, match="gradients 1.0e-03, at most 0.0001 may"):
        line.check(native)
