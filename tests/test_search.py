"""The searches: which images are looked at, when a step is decided, and with what certainty."""

import pytest
import torch

from qkernels.sharpness import search
from qkernels.sharpness.data import Data


@pytest.mark.parametrize("size, num", [(100, 4), (23, 4), (3, 4), (1000, 10), (7, 1)])
def test_shares_give_every_image_to_every_copy_once(size, num):
    x, target = torch.arange(size).float().view(size, 1), torch.arange(size)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    times, first = torch.zeros(num, size, dtype=torch.int64), []
    for index, images, labels in data.shares(num, lambda: 2 * times.sum().item() // num):
        assert torch.equal(images[..., 0], data.whole[0][index, 0]) and torch.equal(
            labels, data.whole[1][index]
        )
        times.scatter_add_(1, index, torch.ones_like(index))
        first.append(times.clone())
    assert (times == 1).all()
    covered = size // num * num
    assert size < num or any((t.sum(0)[:covered] == 1).all() for t in first), "the first turn is not a pass"


class Table:
    """Copies whose predictions are given: right[k, i] for copy k and image i, the image's number being its pixel."""

    def __init__(self, right):
        self.right, self.num = right, len(right)

    def logits(self, x, own=False):
        index = x.flatten(-1).long().view(self.num if own else 1, -1).expand(self.num, -1)
        right = self.right.gather(1, index).float()
        return torch.stack([right, 1 - right], 2)


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("confidence", [None, 4.0])
def test_a_step_that_ends_early_has_the_verdict_of_the_whole(worst, confidence):
    generator = torch.Generator().manual_seed(1)
    n, ended = 1000, 0
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data([(x[i : i + 100], target[i : i + 100]) for i in range(0, n, 100)], "cpu", seed=0)
    base = torch.rand(1, n, generator=generator) < 0.9
    scores = search.Scores.unperturbed(data, Table(base))["accuracy"]
    assert scores.mean == pytest.approx(base.double().mean().item())
    for _ in range(150):
        hard = torch.rand(n, generator=generator) * torch.rand(1, generator=generator)
        right = base & (torch.rand(5, n, generator=generator) > hard * 0.5)
        drops = base.double().mean() - right.double().mean(1)
        displacement = (drops.max() if worst else drops.mean()).item()
        rule = search.Rule(0.1, 0.01, worst, confidence)
        step = rule.evaluate(Table(right), scores, search.Counter())
        ended += step.decided != "complete"
        expected = "within" if abs(displacement - 0.1) < 0.01 else "above" if displacement > 0.1 else "below"
        assert step.verdict == expected
        assert (step.images == n) == (step.decided == "complete")
        if step.decided == "complete" and not worst:
            assert step.stderr == pytest.approx((drops.std() / 5**0.5).item())
    assert ended > 60


def test_what_improves_counts_as_what_falls():
    rule = search.Rule(0.1, 0.01)
    assert rule.interval(-0.3, -0.25) == "above" and rule.interval(-0.05, -0.04) == "below"


def test_regression_gives_the_mean_of_images_not_seen():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    y = 0.3 + z @ torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    found = {}
    for name, known in (("none", z[:, :0]), ("constant", torch.ones_like(z)), ("all", z)):
        regression = search.Regression(known)
        regression.add(y[:30].T, torch.arange(30))
        regression.add(y[30:50].T, torch.arange(30, 50))
        found[name] = regression.mean()
    mean, variance = found["none"]
    assert mean.item() == pytest.approx(y[:50].mean().item())
    errors = (y[:50] - y[:50].mean()).square().sum().item()
    assert variance.item() == pytest.approx((errors + 2) / 49 * (1 - 50 / 200) / 50)
    assert found["constant"][0].item() == pytest.approx(mean.item())
    assert found["all"][0].item() == pytest.approx(y.mean().item(), abs=0.02)
    assert found["all"][1].item() < 0.2 * variance.item()


def test_shares_decide_with_fewer_passes_where_images_differ():
    """Displacements that mostly depend on the image: one pass over the shares says what many over a few images do."""
    generator, n, num = torch.Generator().manual_seed(5), 600, 10
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(100), target.split(100), strict=True)), "cpu", seed=0)
    scores = search.Scores("accuracy", data, torch.ones(n).double(), torch.zeros(n, 0).double())
    seen = complete = 0
    for _ in range(60):
        level = 0.05 + 0.12 * torch.rand(1, generator=generator)
        hard = torch.rand(1, n, generator=generator) < level
        right = torch.rand(num, n, generator=generator) >= hard * 0.9 + 0.01
        displacement = 1 - right.double().mean().item()
        step = search.Rule(0.1, 0.0100123).evaluate(Table(right), scores, search.Counter())
        assert step.verdict == search.Rule(0.1, 0.0100123).point(displacement)
        seen, complete = seen + step.images, complete + n
    assert seen < 0.4 * complete


def test_what_is_known_of_the_images_ends_steps_earlier():
    """Displacements that depend on what is known of an image, and the verdicts of the whole."""
    generator, n, seen = torch.Generator().manual_seed(2), 1000, {True: 0, False: 0}
    rank = torch.rand(n, generator=generator)
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    order = torch.cat([x for x, _ in data.kept]).flatten().long()
    for i in range(40):
        hard = (rank < i / 400).double()
        right = torch.rand(10, n, generator=generator) >= 0.9 * hard
        drop = 1 - right.double().mean().item()
        for informed in seen:
            known = hard[order, None] if informed else hard[:, None][:, :0]
            scores = search.Scores("accuracy", data, torch.ones(n, dtype=torch.float64), known)
            step = search.Rule(0.05, 0.00512345).evaluate(Table(right), scores, search.Counter())
            assert step.verdict == search.Rule(0.05, 0.00512345).point(drop)
            seen[informed] += step.images
    assert seen[True] < 0.9 * seen[False]


def test_a_complete_step_shortens_the_next_one_of_its_search():
    generator, n = torch.Generator().manual_seed(3), 1000
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    scores = search.Scores("accuracy", data, torch.ones(n).double(), torch.zeros(n, 0).double())
    right = torch.rand(1, n, generator=generator).expand(10, n) >= 0.1
    rule = search.Rule(1 - right.double().mean().item(), 1e-9)  # within: only a complete step can tell
    assert rule.evaluate(Table(right), scores, search.Counter()).decided == "complete"
    more = right & (torch.rand(1, n, generator=generator) >= 0.03)
    steps = [
        r.evaluate(Table(more), scores, search.Counter()) for r in (rule, search.Rule(rule.target, 1e-9))
    ]
    assert [s.verdict for s in steps] == ["above", "above"]
    assert steps[0].images < 0.8 * steps[1].images
