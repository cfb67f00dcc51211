"""The report: needs no network, shows what the files say, and lets nobody's text out of its place."""

import html.parser
import itertools
import json
import math
import re

import pytest
from fake_run import fake_run

from sftjax.config import UserError, default
from sftjax.train import chart
from sftjax.train.fit import at, judge, slowing
from sftjax.train.report import write_report
from sftjax.train.run import Run

HOSTILE = """</script></pre><script>alert(1)</script>"'><img src=https://evil.example/x.png onerror=alert(2)>&amp;{{ 7 * 7 }}"""


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser sees them."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th", "dt", "dd", "div") else ""

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def report(workdir) -> str:
    return write_report(workdir).read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return report(fake_run(tmp_path_factory.mktemp("run")))


def test_needs_no_network(source):
    page = Page(source)
    assert not re.search(r"https?://|@import|url\(", source)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not {"img", "iframe", "link", "object", "embed", "base"} & set(page.tags)
    assert not page.open


def test_shows_what_the_files_say(source):
    words = " ".join(Page(source).text.split())
    for part in (
        "3.164 → 0.561",
        "2.1 % → 91.7 %",
        "513k",
        "8.12k",
        "NVIDIA H200",
        "A good fit",
        "dropped: overlong 61",
        "5e-4 2e-4",
    ):
        assert part in words, part
    assert "1 logged step had a loss that is not finite" in words
    assert "Qwen3-0.6B" in words and "data.max_length 512 1024" in words


def test_answers_stand_side_by_side_with_marks(source):
    assert source.count('<article class="card sample"') == 48
    counts = {fate: int(n) for fate, n in re.findall(r'<i class="(\w+)"></i>.*? (\d+)</button>', source)}
    assert sum(counts.values()) == 48
    assert source.count("✓ correct") == counts["fixed"] + 2 * counts["kept"] + counts["broken"]
    assert source.count("✗ wrong") == counts["fixed"] + counts["broken"] + 2 * counts["missed"]


def test_hostile_text_stays_text(tmp_path):
    source = report(fake_run(tmp_path, hostile=HOSTILE))
    page = Page(source)
    assert HOSTILE in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not page.open


def test_only_its_own_script_may_run(tmp_path, source):
    again = report(fake_run(tmp_path))
    nonces = [
        re.findall(r"script-src 'nonce-(\w+)'", page) + re.findall(r'<script nonce="(\w+)"', page) for page in (source, again)
    ]
    assert nonces[0][0] == nonces[0][1] and nonces[1][0] == nonces[1][1]
    assert nonces[0][0] != nonces[1][0]
    assert "default-src 'none'" in source


def evaluated(workdir, hostile=""):
    """A run with samples of two steps, and what an evaluation found."""
    fake_run(workdir, hostile=hostile)

    def of(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    def figures(rows):
        loss = {"rows": rows, "base": of(3.0), "tuned": of(1.0), "difference": of(-2.0)}
        return {"loss": loss, "bleu": {"rows": rows - 1, "base": of(0.2), "tuned": None, "difference": None}}

    moved = {
        "where": "f:1" + hostile,
        "change": -0.5,
        "prompt": "p" + hostile,
        "expected": "e",
        "base": "b",
        "tuned": "t" + hostile,
    }
    found = {
        "of": {"workdir": "w", "step": 400, "split": "test"},
        "rows": 9,
        "answered": 8,
        "models": ["base", "tuned"],
        "metrics": ["bleu"],
        "how": {"bleu": "sacrebleu's of the corpus, tokenizer zh"},
        "intervals": {"per_cent": 95, "draws": 1000, "seed": 0},
        "figures": [{"tag": None, "figures": figures(9)}, {"tag": "sums" + hostile, "figures": figures(4)}],
        "changed": {"better": [], "worse": [moved]},
    }
    with Run(workdir) as run:
        for step, said in ((5, "no"), (10, "no"), (15, "yes")):
            answer = {
                "prompt": "p" + hostile,
                "expected": "yes",
                "text": said + hostile,
                "stopped": step > 5,
                "exact": said == "yes",
            }
            run.note(step, "sample", {"answers": [answer]})
    with Run(workdir / "eval") as place:
        place.write_json("eval.json", found)
    return workdir


def test_an_evaluation_and_samples_have_their_sections(tmp_path, source):
    page = Page(report(evaluated(tmp_path)))
    words = " ".join(page.text.split())
    for part in (
        "Step 400, test rows: the loss of 9, the answers of 8.",
        "loss 3.000 [2.950, 3.050] 1.000 [0.950, 1.050] -2.000 [-2.050, -1.950] better",
        "BLEU 20.0 [15.0, 25.0] - -",
        "BLEU: sacrebleu's of the corpus, tokenizer zh",
        "-50.0 f:1",
        "Answers while it trained",
        "step 5 no",  # which did not stop
        "step 10 no",
        "step 15 yes",
    ):
        assert part in words, part
    assert "sums 4 20.0" in words and not page.open
    for heading in ("Evaluation</h2>", "Answers while it trained"):
        assert heading not in source


def test_hostile_text_of_an_evaluation_stays_text(tmp_path):
    page = Page(report(evaluated(tmp_path, HOSTILE)))
    for part in ("sums" + HOSTILE, "f:1" + HOSTILE, "t" + HOSTILE, "yes" + HOSTILE):
        assert part in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags and not page.open


def preference_run(workdir, task, **more):
    """Five steps of a run whose chosen answers gain, evaluated at both ends."""
    config = default()
    config.task = task
    with Run(workdir) as run:
        run.resume_from(-1)
        run.write_json("config.json", config)
        for step in range(6):
            rewards = {"rewards/chosen": step / 10, "rewards/rejected": -step / 5, "rewards/margins": 0.3 * step}
            metrics = {"loss": 0.7 - step / 10, "logps/chosen": -9.0, "logps/rejected": -9.0 - step} | rewards | more
            if step:
                run.log(step, metrics)
            if step in (0, 5):
                run.log(step, metrics, kind="eval")
        run.write_json(
            "summary.json", {"accuracy_before": 0.5, "accuracy": 0.973, "logps_chosen_before": -9.04, "logps_chosen": -9.5}
        )
    return workdir


def titles(source):
    return re.findall(r"<figcaption><h3>(.*?)</h3>", source)


def test_preferences_have_charts_of_their_own(tmp_path, source):
    page = report(preference_run(tmp_path / "dpo", "dpo", **{"rewards/accuracies": 0.9}))
    words = " ".join(Page(page).text.split())
    assert "Preference accuracy 50.0 % → 97.3 %" in words
    assert "Log-prob of a chosen answer -9.0 → -9.5" in words
    wanted = ["Loss per pair", "Reward of an answer", "Log-prob of an answer", "Margin", "Accuracy"]
    assert [t.partition(":")[0] for t in titles(page)] == wanted
    assert page.count('class="dots worse"') == 2 == page.count('class="line better faint"')
    kto = titles(report(preference_run(tmp_path / "kto", "kto", kl=0.1)))
    assert kto[0] == "Loss per answer" and "KL" in kto[-1] and not any("Accuracy" in t for t in kto)
    assert "Loss per trained token" in titles(source) and not any("Reward" in t for t in titles(source))


@pytest.mark.parametrize("missing", ["config.json", "manifest.json", "metrics.jsonl", "summary.json", "samples.jsonl"])
def test_any_file_may_be_missing(tmp_path, missing):
    workdir = fake_run(tmp_path, steps=40)
    (workdir / missing).unlink()
    assert not Page(report(workdir)).open


def test_metrics_of_one_line_and_null_values(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": null, "grad_norm": 0, "nonfinite": 1}\n{"step": 2, "ki'
    )
    (tmp_path / "summary.json").write_text('{"eval_loss": null, "steps": 1}')
    assert "Too few evaluations" in report(tmp_path)


def test_messages_tools_and_long_texts_are_shown(tmp_path):
    prompt = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Hi"}]
    row = {"prompt": prompt, "expected": {"tool": "weather"}, "base": "x" * 5000, "tuned": None, "exact_tuned": True}
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    words = Page(report(tmp_path)).text
    assert "system: Be <b>brief</b>.\nuser: Hi" in words and '{"tool": "weather"}' in words and "1,000 more characters" in words


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match="run sftjax train first"):
        write_report(tmp_path)


def curve(*losses: float) -> list[tuple[int, float]]:
    return [(10 * i, loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "kind, best, losses",
    [
        ("overfit", 30, (3, 2, 1.2, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)),
        ("underfit", 100, (3, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0)),
        ("good", 100, (3, 2, 1.5, 1.2, 1.1, 1.05, 1.03, 1.02, 1.01, 1.005, 1.0)),
        ("good", 50, (3, 2, 1.5, 1.2, 1.1, 1.00, 1.005, 1.01, 1.01, 1.01, 1.01)),  # up, but by less than 2 %
        ("good", 20, (3, 0.1, 0.004, 0.005, 0.006, 0.006, 0.006, 0.006, 0.006, 0.006, 0.006)),  # up, by next to nothing
        ("good", 90, (3, 2, 1.5, 1.2, 1.1, 1.05, 1.03, 1.02, 1.01, 0.98, 1.01)),  # up, but only at the very end
        ("worse", 0, (3, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0)),
        ("flat", 20, (3, 2.99, 2.98, 2.99, 3.0, 3.0, 2.99, 2.98, 2.99, 2.99, 2.99)),
        ("unknown", None, (3, 2)),
        # few points: falling, slowing down so that it may have levelled off or not, level, flat, up again
        ("underfit", 20, (3, 2, 1)),
        ("underfit", 20, (3, 2, 1.5)),
        ("unknown", 20, (3, 1.1, 1.0)),
        ("good", 20, (3, 1.0, 0.99)),
        ("flat", 10, (2, 1.99, 2)),
        ("overfit", 10, (3, 1, 1.5)),
        ("worse", 0, (2, 2.1, 2.2)),
        ("underfit", 30, (3, 2.2, 1.6, 1.2)),
        ("good", 30, (3, 1.1, 1.01, 1.0)),
        ("overfit", 20, (3, 1.5, 1, 1.1)),
        ("good", 40, (3, 1.6, 1.1, 1.02, 1.0)),
        ("overfit", 30, (3, 1.6, 1.1, 1.0, 1.1)),
        ("underfit", 50, (3, 2, 1.5, 1.3, 1.2, 1.1)),
        ("overfit", 40, (3, 2, 1.5, 1.1, 1.0, 1.1)),
    ],
)
def test_fit_is_judged_by_the_stated_rules(kind, best, losses):
    fit = judge([], curve(*losses))
    assert (fit.kind, fit.best_step) == (kind, best)


@pytest.mark.parametrize("evals", [(0, 3, 6, 9, 11), (0, 2, 4, 6, 7)])
def test_a_rise_at_the_end_counts_however_short_the_last_stretch_is(evals):
    """Five evaluations a run, where its steps do not divide by five."""
    assert judge([], list(zip(evals, (3, 2, 1.5, 1, 1.5)))).kind == "overfit"


@pytest.mark.parametrize("rate", [3, 4, 8])
@pytest.mark.parametrize("steps", [(0, 50, 100), (0, 30, 60, 90, 100), (0, 33, 66, 100), (0, 70, 100)])
def test_an_exponential_fall_is_read_exactly_between_even_points_and_better_than_by_a_line_between_others(rate, steps):
    points = [(step, 1 + 2 * math.exp(-rate * step / 100)) for step in steps]
    true = 1 + 2 * math.exp(-rate * 0.8)
    error = abs(slowing(points, 80) - true)
    assert error < 1e-9 if len({b - a for a, b in itertools.pairwise(steps)}) == 1 else error < abs(at(points, 80) - true)


def test_a_gap_to_the_training_loss_is_noted():
    flat = curve(3, 1.2, 1.0, 1.0, 1.0)
    assert "memorised" in judge([(40, 0.3)], flat).text
    assert "memorised" not in judge([(40, 0.9)], flat).text


def test_a_curve_is_read_between_its_points():
    assert at(curve(3, 1), 5) == 2 and at(curve(3, 1), 10) == 1 and at(curve(3, 1), 99) == 1


@pytest.mark.parametrize("low, high", [(0, 1), (0.13, 0.19), (3, 3), (0, 0), (-2e-5, 7e-4), (1, 1e6), (-5, -1)])
def test_ticks_cover_the_values_and_are_few(low, high):
    found = chart.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


def test_thinning_keeps_every_extreme():
    points = [(i, 1.0 + (99 if i == 4321 else 0) - (5 if i == 777 else 0)) for i in range(10_000)]
    kept = chart.thin(points)
    assert len(kept) <= chart.MAX_POINTS and (4321, 100.0) in kept and (777, -4.0) in kept


def test_smoothing_does_not_lag_behind_a_line():
    points = [(i, 100.0 - i) for i in range(100)]
    assert [y for _, y in chart.smooth(points)] == pytest.approx([y for _, y in points])
