"""Resampled rows: one matrix product is the same as drawing and scoring, pairs are drawn together, and tags add up."""

import numpy as np
import pytest

from sftjax.evaluate import bootstrap
from sftjax.evaluate.bootstrap import interval, resampled
from sftjax.evaluate.figures import Part, by_tag, changed, kinds, verdict
from sftjax.evaluate.heldout import Answer, Question
from sftjax.evaluate.loss import perplexity
from sftjax.evaluate.metrics import all_sums, mean, ratio

RNG = np.random.default_rng(0)
NAMES = ("exact_match", "macro_f1", "chrf")
EXPECTED = RNG.choice(["yes", "no", "maybe so"], 60).tolist()
ANSWERS = [e if RNG.random() < 0.6 else "no" for e in EXPECTED]


def test_the_interval_of_a_constant_is_that_constant():
    for value in (0.0, 0.1, 1.0):
        assert interval(*resampled([mean([value] * 37)])) == pytest.approx((value, value))
    assert interval(np.array([np.nan, np.nan, 1.0])) is None


def test_draws_are_figures_of_rows_drawn_with_replacement(monkeypatch):
    """The same in blocks; and as the textbook has it, for a mean: its standard error."""
    scores = RNG.random(50)
    (drawn,) = resampled([mean(scores)], draws=4000)
    assert drawn.std() == pytest.approx(scores.std() / np.sqrt(50), rel=0.05)
    low, high = interval(drawn)
    assert (high - low) / 2 == pytest.approx(1.96 * drawn.std(), rel=0.08)
    monkeypatch.setattr(bootstrap, "BLOCK", 50 * 7)
    (again,) = resampled([mean(scores)], draws=4000)
    np.testing.assert_allclose(again, drawn)
    assert not np.allclose(drawn, resampled([mean(scores)], draws=4000, seed=1)[0])


def test_a_model_and_itself_do_not_differ_and_a_pair_is_drawn_together():
    part = Part([()] * 60, {name: [of, of] for name, of in all_sums(NAMES, ANSWERS, EXPECTED).items()})
    (whole,) = by_tag([part], ("base", "tuned"))
    for of in whole["figures"].values():
        assert of["base"] == of["tuned"] and of["difference"] == {"value": 0, "low": 0, "high": 0}
        assert of["base"]["low"] <= of["base"]["value"] <= of["base"]["high"]
    scores = RNG.random(40)
    (shifted,) = by_tag([Part([()] * 40, {"x": [mean(scores), mean(scores + 0.01)]})], ("base", "tuned"))
    difference = shifted["figures"]["x"]["difference"]
    assert [difference[key] for key in ("value", "low", "high")] == pytest.approx([0.01] * 3)
    assert verdict("x", difference) == "better" and verdict("loss", difference) == "worse"
    assert verdict("mean_length", difference) == "" and verdict("x", {"value": 0.1, "low": -1, "high": 1}) == "not clear"


def test_tags_add_up():
    """Rows of tags that share none: counts and sums are those of all. A tag inside another counts for both."""
    tags = [[("sums/plus",), ("sums/minus", "hard"), ("words",)][i % 3] for i in range(60)]
    values, counts = RNG.random(60), RNG.integers(1, 9, 60)
    loss = ratio(values, counts)
    parts = [Part(tags, {"loss": [loss], "perplexity": [perplexity(loss)]})]
    whole, *rest = by_tag(parts, ("model",))
    found = {one["tag"]: one["figures"]["loss"] for one in rest}
    assert [*found] == ["hard", "sums", "sums/minus", "sums/plus", "words"]
    assert kinds(("a/b/c", "a/d")) == {"a", "a/b", "a/b/c", "a/d"}

    def of(tag):
        mine = [i for i, t in enumerate(tags) if tag in kinds(t)]
        assert found[tag]["rows"] == len(mine)
        assert found[tag]["model"]["value"] == pytest.approx(values[mine].sum() / counts[mine].sum())
        return found[tag]["model"]["value"] * counts[mine].sum()

    assert of("sums") + of("words") == pytest.approx(values.sum())
    assert of("sums/plus") + of("sums/minus") == pytest.approx(of("sums"))
    total = values.sum() / counts.sum()
    assert whole["figures"]["loss"]["model"]["value"] == pytest.approx(total)
    assert whole["figures"]["perplexity"]["model"]["value"] == pytest.approx(np.exp(total))
    assert found["hard"] == found["sums/minus"]


def test_a_part_of_the_rows_that_has_no_tag_has_no_figure():
    parts = [Part([("a",), ()], {"x": [mean([0, 1])]}), Part([()], {"y": [mean([1])]})]
    whole, tagged = by_tag(parts, ("model",))
    assert [*whole["figures"]] == ["x", "y"] and [*tagged["figures"]] == ["x"]


def test_rows_that_changed_are_told_both_ways_and_the_most_first():
    def answers(*texts):
        return [Answer("p", "the cat sat", text, True, False, 1) for text in texts]

    asked = [Question([], f"p{i}", "the cat sat", where=f"f:{i}") for i in range(4)]
    base = answers("the cat sat", "x", "x", "a cat")
    tuned = answers("the cat", "cat", "the cat sat", "a cat")
    found = changed(asked, base, tuned, ["token_f1", "macro_f1"])
    assert [row["where"] for row in found["better"]] == ["f:2", "f:1"] and found["better"][0]["change"] == 1
    assert [row["where"] for row in found["worse"]] == ["f:0"]
    assert found["worse"][0] | {"change": 0} == {
        "where": "f:0",
        "change": 0,
        "prompt": "p0",
        "expected": "the cat sat",
        "base": "the cat sat",
        "tuned": "the cat",
    }
