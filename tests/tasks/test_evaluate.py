"""`sftjax eval` says of a run what training said, of an export what it says of the run, and of a model and itself nothing."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest
import toy as worlds

from sftjax import tasks
from sftjax.config import UserError, default
from sftjax.evaluate import heldout
from sftjax.tasks.evaluate import evaluate_model, evaluate_run
from sftjax.tasks.export import export
from sftjax.train.run import Run

KEYS = {"train.steps": 8, "train.eval_every": 4, "eval.generate": 12, "eval.max_new_tokens": 8, "data.split": (3, 2, 1)}


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A run whose rows carry tags, and its config."""
    root = tmp_path_factory.mktemp("eval")
    rows = [row | {"tags": [f"colour/{i % 2}"] if i % 3 else []} for i, row in enumerate(toy.rows)]
    config = toy.config(**KEYS | {"data.train": (str(worlds.write_rows(root / "tagged.jsonl", rows)),)})
    tasks.train(config, root / "run")
    return root / "run", config


@pytest.fixture(scope="module")
def found(run):
    workdir, _ = run
    return evaluate_run(workdir, split="eval", rows=12, say=lambda _: None), workdir


def whole(found):
    return found["figures"][0]["figures"]


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_loss_is_that_of_training(found):
    found, workdir = found
    loss, told = whole(found)["loss"], summary(workdir)
    assert loss["tuned"]["value"] == pytest.approx(told["eval_loss"], rel=1e-5)
    assert loss["base"]["value"] == pytest.approx(told["eval_loss_before"], rel=1e-5)
    assert loss["difference"]["value"] == pytest.approx(told["eval_loss"] - told["eval_loss_before"], rel=1e-4)
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert whole(found)["perplexity"]["tuned"]["value"] == pytest.approx(last["ppl"], rel=1e-5)


def test_the_answers_are_those_of_training(found):
    """The same rows, answered by the same models, scored alike."""
    found, workdir = found
    rows = [json.loads(line) for line in (workdir / "eval" / "predictions.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, samples, strict=True):
        assert {key: row[key] for key in ("prompt", "expected", "base", "tuned", "tuned_stopped")} == {
            key: sample[key] for key in ("prompt", "expected", "base", "tuned", "tuned_stopped")
        }
        assert row["tuned_scores"]["exact_match"] == sample["exact_tuned"]
    told = summary(workdir)
    for name in ("exact_match", "token_f1", "stop_rate", "empty", "repeated", "overlong", "mean_length"):
        assert whole(found)[name]["tuned"]["value"] == pytest.approx(told[name])
        assert whole(found)[name]["base"]["value"] == pytest.approx(told[f"{name}_before"])


def test_tags_reach_held_out_rows_and_add_up(found):
    found, workdir = found
    by_tag = {one["tag"]: one["figures"] for one in found["figures"]}
    assert [*by_tag] == [None, "colour", "colour/0", "colour/1"]
    rows = {tag: {name: of["rows"] for name, of in figures.items()} for tag, figures in by_tag.items()}
    assert rows["colour"]["loss"] == rows["colour/0"]["loss"] + rows["colour/1"]["loss"] < rows[None]["loss"] == found["rows"]
    told = [json.loads(line) for line in (workdir / "eval" / "predictions.jsonl").read_text().splitlines()]
    mine = [row for row in told if row["tags"] == ["colour/1"]]
    assert rows["colour/1"]["exact_match"] == len(mine)
    lengths = [row["tuned_tokens"] for row in mine]
    assert by_tag["colour/1"]["mean_length"]["tuned"]["value"] == pytest.approx(sum(lengths) / len(lengths))


def test_eval_json_is_what_is_returned_and_the_report_has_it(found):
    found, workdir = found
    assert json.loads((workdir / "eval" / "eval.json").read_text()) == found
    page = (workdir / "report.html").read_text()
    assert "Evaluation" in page and "colour/1" in page
    assert found["of"] == {"workdir": str(workdir), "step": 8, "split": "eval"}
    step = evaluate_run(workdir, checkpoint="best", rows=0, out=workdir / "other", say=lambda _: None)
    assert step["of"]["split"] == "test" and [*whole(step)] == ["loss", "perplexity"] and "changed" not in step
    told = summary(workdir)
    if told["best"]["step"] == 8:
        assert whole(step)["loss"]["tuned"]["value"] == pytest.approx(told["test_loss"], rel=1e-5)


def test_an_export_is_what_the_run_was(toy, run, found, tmp_path):
    """The held-out rows as a file, asked of the merged checkpoint beside the base."""
    (workdir, config), (of_run, _) = run, found
    export(workdir, out=tmp_path / "out", say=lambda _: None)
    predicted = [json.loads(line) for line in (workdir / "eval" / "predictions.jsonl").read_text().splitlines()]
    lines = [int(row["where"].rpartition(":")[2]) for row in predicted]
    source = (workdir.parent / "tagged.jsonl").read_text().splitlines()
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(source[line - 1] for line in lines) + "\n")
    told = {"data": str(asked), "base": str(toy.base), "say": lambda _: None}
    of_file = evaluate_model(str(tmp_path / "out"), config, **told, out=tmp_path / "eval")
    again = {row["prompt"]: row for row in map(json.loads, (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines())}
    for row in predicted:
        assert (again[row["prompt"]]["base"], again[row["prompt"]]["tuned"]) == (row["base"], row["tuned"])
        assert again[row["prompt"]]["tags"] == row["tags"]
    for name in of_run["metrics"]:
        for model in ("base", "tuned", "difference"):
            assert whole(of_file)[name][model]["value"] == pytest.approx(whole(of_run)[name][model]["value"])
    same = evaluate_model(str(tmp_path / "out"), config, **told | {"base": str(tmp_path / "out")}, metrics=["chrf"])
    for name, of in whole(same).items():
        assert of["base"] == of["tuned"] and set(of["difference"].values()) == {0}, name
    assert same["changed"] == {"better": [], "worse": []}


def test_a_run_goes_on_and_is_evaluated_on_another_day(toy, tmp_path, monkeypatch):
    """Though its template writes the day's date, and its data is tokenised again."""
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}\n" + worlds.CHATML)
    seen = []
    for day in (1, 2):
        clock = SimpleNamespace(now=lambda day=day: seen.append(day) or datetime(2030, 2, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        changes = {"data.template": str(tmp_path / "dated.jinja"), "data.cache_dir": str(tmp_path / f"cache{day}")}
        tasks.train(toy.config(**changes, **{"train.steps": 2, "eval.generate": 2}), tmp_path / "run")
    got = evaluate_run(tmp_path / "run", rows=2, max_new_tokens=2, say=lambda _: None)
    assert got["answered"] == 2 and not seen


def test_plain_text_has_a_loss_and_no_answers(toy, tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"{i} grass is green\n\n" for i in range(40)))
    config = toy.config(**{"task": "pretrain", "data.train": (str(tmp_path / "mine.txt"),), "train.steps": 2})
    tasks.train(config, tmp_path / "run")
    found = evaluate_run(tmp_path / "run", split="eval", say=lambda _: None)
    told = summary(tmp_path / "run")
    assert whole(found)["loss"]["tuned"]["value"] == pytest.approx(told["eval_loss"], rel=1e-5)
    assert found["answered"] == 0 and [*whole(found)] == ["loss", "perplexity"]


def test_what_would_measure_something_else_is_refused(toy, run, tmp_path):
    workdir, config = run
    other = config.copy_and_resolve_references()
    other.data.split = (5, 1, 1)
    with pytest.raises(UserError, match=r"was trained otherwise:\n  config.data.split: \[3, 2, 1\] -> \[5, 1, 1\]"):
        evaluate_run(workdir, other)
    allowed = config.copy_and_resolve_references()
    allowed.eval.max_new_tokens = 1
    assert (
        whole(evaluate_run(workdir, allowed, rows=2, out=tmp_path / "one", say=lambda _: None))["mean_length"]["tuned"]["value"]
        <= 1
    )
    data = workdir.parent / "tagged.jsonl"
    text = data.read_text()
    try:
        data.write_text(text.replace("grass", "moss"))
        with pytest.raises(UserError, match="the data is not what the run was trained on"):
            evaluate_run(workdir, say=lambda _: None)
    finally:
        data.write_text(text)
    wide = worlds.make_base(tmp_path / "wide")
    tokenizer = json.loads((wide / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|end|>"
    (wide / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate_model(str(toy.base), data=str(data), base=str(wide))


@pytest.mark.parametrize(
    "changes, why", [({"task": "reward"}, "a run of task reward"), ({"classify.by": "head"}, "a classifier by its head")]
)
def test_a_run_that_generates_nothing_or_learns_otherwise_is_told(tmp_path, changes, why):
    config = default()
    config.task = "classify"
    for key, value in changes.items():
        *path, name = key.split(".")
        (config[path[0]] if path else config)[name] = value
    with Run(tmp_path) as run:
        run.write_json("config.json", config)
    with pytest.raises(UserError, match=rf"{why}.*report.html"):
        evaluate_run(tmp_path)


def test_where_nothing_can_be_written_is_told_before_anything_is_done(toy, run, tmp_path):
    (tmp_path / "file").write_text("")
    done = []
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^--out={out}: cannot be made or written"):
            evaluate_run(run[0], out=out, say=done.append)
        with pytest.raises(UserError, match=f"^--out={out}: cannot be made or written"):
            evaluate_model(str(toy.base), data=str(toy.data), out=out, say=done.append)
    assert not done
    with pytest.raises(UserError, match=r"^--max-new-tokens=0: needs"):
        evaluate_model(str(toy.base), data=str(toy.data), max_new_tokens=0)


def test_a_model_computes_in_the_type_that_it_is_told(toy):
    config = default()
    config.data.max_length = 64
    losses = []
    for config.model.dtype in ("float32", "bfloat16"):
        found = evaluate_model(str(toy.base), config, data=str(toy.data), rows=0, say=lambda _: None)
        losses.append(whole(found)["loss"]["model"]["value"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_more_rows_are_answered_from_the_same_shuffle(run, tmp_path):
    workdir, _ = run
    asked = []
    for rows in (2, 4):
        evaluate_run(workdir, rows=rows, metrics=["contains"], out=tmp_path / str(rows), say=lambda _: None)
        told = (tmp_path / str(rows) / "predictions.jsonl").read_text().splitlines()
        asked.append([json.loads(line)["prompt"] for line in told])
    assert len(asked[0]) == 2 and asked[1][:2] == asked[0]


def test_a_question_knows_its_tags_and_its_place(run):
    from sftjax.data.chat import Chat
    from sftjax.data.example import Example, Message
    from sftjax.hf.model import load

    _, config = run
    chat = Chat(load(config.model.path).tokenizer)
    row = Example("f", 3, messages=(Message("user", "q"), Message("assistant", "a")), tags=("x",))
    q = heldout.question(chat, row)
    assert (q.tags, q.where) == (("x",), "f:3")
