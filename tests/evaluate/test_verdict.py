"""What a comparison says follows from the rows: it tells what they tell, and admits what they do not."""

import numpy as np
import pytest

from sftjax.evaluate.metrics import mean
from sftjax.evaluate.verdict import Cell, best, figures, rivals, verdict


def cells(**scores):
    """`cells(base__plain=[0, 1, ...])`"""
    named = [name.split("__") for name in scores]
    of = figures([{"m": mean(np.asarray(values, float))} for values in scores.values()])
    return [Cell(model, prompt, figure) for (model, prompt), figure in zip(named, of)]


def right(n, share, seed=0):
    """n scores of which `share` are 1, anywhere."""
    return np.random.default_rng(seed).permutation(np.arange(n) < share * n)


def test_a_difference_is_resampled_as_a_difference():
    hard = right(400, 0.5)
    a, b = cells(a__p=hard, b__p=np.where(np.arange(400) < 12, 1, hard))  # few rows, all in favour of b
    edge = b.figures["m"] - a.figures["m"]
    assert edge.told and 0 < edge.low < edge.value < edge.high
    assert b.figures["m"].low < a.figures["m"].high  # which their own intervals do not show


def test_an_interval_covers_what_it_should():
    """Of 95% intervals for a mean of 0.3, near 95% hold it."""
    rng = np.random.default_rng(0)
    held = [cells(a__p=rng.random(100) < 0.3)[0].figures["m"] for _ in range(100)]
    assert 0.9 <= np.mean([f.low <= 0.3 <= f.high for f in held]) <= 0.99


def test_a_tuned_model_that_wins():
    said = verdict(cells(base__plain=right(200, 0.3), base__long=right(200, 0.5, 1), tuned__plain=right(200, 0.9, 2)), "m", 200)
    assert said[0].startswith("With base, the best prompt is long, 50.0 [") and "it beats plain by 20.0 [" in said[0]
    assert said[1].startswith("tuned with plain beats base with long, the best of base, by 40.0 [")
    assert said[2].startswith("So no prompt tried here makes base as good as tuned, which is worth 40.0 points, and ")


def test_a_prompt_that_is_good_enough():
    same = right(100, 0.8)
    said = verdict(cells(base__plain=same, tuned__plain=np.roll(same, 1)), "m", 100)
    assert said[0].startswith("These 100 rows cannot tell tuned with plain from base with plain (0.0 [-")
    assert said[1].startswith(
        "So base with plain is good enough as far as these rows can tell: no other model beats it, and none"
    )
    worse = verdict(cells(base__plain=same, tuned__plain=0 * same), "m", 100)
    assert (
        "tuned with plain falls behind base with plain, the best of base, by 80.0 [" in worse[0] and "all are worse" in worse[1]
    )


def test_equal_answers_and_one_model():
    same = right(50, 0.6)
    tie = verdict(cells(a__p=same, b__p=same), "m", 50)
    assert tie[0] == "b with p scores as a with p does, row by row."
    assert tie[1].endswith("no other model beats it, and none is better on these rows.")
    beside = verdict(cells(a__p=same, b__p=same, c__p=0 * same), "m", 50)  # one is worse, one is not
    assert beside[2].endswith("no other model beats it, and none is better on these rows.")
    alone = verdict(cells(a__p=same), "m", 50)
    assert alone[0].startswith("a with p scores 60.0 [") and "the 40.0 points that are left" in alone[1]
    assert rivals(cells(a__p=same), "m") is None


def test_how_many_rows_would_tell():
    a = right(100, 0.50)
    b = a.copy()
    b[np.flatnonzero(~a)[:20]] = True
    b[np.flatnonzero(a)[:16]] = False  # +4 points, from 36 rows that differ
    (said, *_) = verdict(cells(a__p=a, b__p=b), "m", 100)
    n = int(said.partition("; some ")[2].split()[0].replace(",", ""))
    assert 700 <= n <= 1050  # (1.96 / 0.04)^2 (0.36 - 0.04^2) = 860


def test_nothing_right_and_few_rows():
    zero = np.zeros(10)
    assert verdict(cells(a__p=zero, b__p=zero), "m", 10)[0].startswith("No answer scores above 0 by m")
    assert verdict(cells(a__p=right(10, 0.5)), "m", 10)[-1].startswith("10 rows are few")


@pytest.mark.parametrize("models", [1, 2])
def test_rivals_are_the_best(models):
    found = cells(
        a__p=right(50, 0.2), a__q=right(50, 0.6), **({"b__p": right(50, 0.4), "b__q": right(50, 0.1)} if models > 1 else {})
    )
    one, other = rivals(found, "m")
    assert one is best(found[:2], "m") is found[1]
    assert other is (found[2] if models > 1 else found[0])
