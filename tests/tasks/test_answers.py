"""Held-out rows answered before and after training: which are asked, and when the answers from before still hold."""

import json
import shutil
import signal

import pytest
import toy as worlds
from ml_collections import ConfigDict

from sftjax import tasks, tree
from sftjax.config import UserError
from sftjax.evaluate import heldout
from sftjax.generate.engine import Engine
from sftjax.generate.open import open_engine
from sftjax.tasks import answers, job, rollouts
from sftjax.tasks.answers import FILE, Answers
from sftjax.tasks.job import Job
from sftjax.tasks.rollouts import Actor
from sftjax.weights.kinds import LowRank

SHORT = {"train.steps": 2, "train.eval_every": 0, "eval.generate": 4, "eval.max_new_tokens": 4}


def samples(workdir):
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("split, why", [("0.5,0.5", "no held-out row asks for a text"), ("1,0", "no rows are held out")])
def test_rows_that_ask_nothing_are_trained_without_answers(toy, tmp_path, capfd, split, why):
    (tmp_path / "mine.txt").write_text("".join(f"{i} grass is green\n\n" for i in range(30)))
    shares = tuple(map(float, split.split(",")))
    changes = SHORT | {"data.train": (str(tmp_path / "mine.txt"),), "data.split": shares}
    summary = tasks.train(toy.config(**changes), tmp_path / "run")
    assert "exact_match" not in summary and samples(tmp_path / "run") == []
    assert f"eval.generate=4: {why}" in capfd.readouterr().out


def test_rows_that_ask_are_found_among_those_that_do_not(toy, tmp_path):
    plain = [{"messages": [{"role": "user", "content": f"{i}, nobody answers"}]} for i in range(20)]
    for row in plain:
        row["messages"][0]["loss"] = 1.0
    data = worlds.write_rows(tmp_path / "mixed.jsonl", plain + toy.rows[:6])
    changes = SHORT | {"data.train": (str(toy.data),), "data.eval": (str(data),)}
    tasks.train(toy.config(**changes), tmp_path / "run")
    asked = [s["prompt"] for s in samples(tmp_path / "run")]
    assert len(asked) == 4 and set(asked) <= {row["messages"][0]["content"] for row in toy.rows[:6]}


def test_an_answer_ends_as_it_does_when_the_model_is_served(toy, tmp_path, monkeypatch):
    base = shutil.copytree(toy.base, tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    run, ended = Job(toy.config(**SHORT | {"model.path": str(base)}), tmp_path / "run"), []

    def engine(model, params, *, stop_ids, **_):
        ended.append({*stop_ids})
        raise StopIteration

    monkeypatch.setattr(answers, "Engine", engine)
    monkeypatch.setattr(rollouts, "Engine", engine)
    params = tree.join(run.trainable, run.frozen)
    grpo = ConfigDict({"max_completion_length": 4, "temperature": 1.0, "top_p": 1.0})
    for answering in (Answers(run).before, lambda: Actor(run, grpo, len).answers(params, run.splits.train, [0])):
        with pytest.raises(StopIteration):
            answering()
    assert ended == [open_engine(str(base))[0].stop_ids] * 2 == [{5, 7, *run.chat.stop_ids}] * 2


def test_the_seed_chooses_the_rows_from_all_that_are_held_out(toy, tmp_path):
    data = worlds.write_rows(tmp_path / "held.jsonl", toy.rows[:40])
    asked = []
    for i, seed in enumerate((0, 0, 1)):
        changes = SHORT | {"train.steps": 1, "data.eval": (str(data),), "seed": seed}
        tasks.train(toy.config(**changes), tmp_path / str(i))
        asked.append([s["prompt"] for s in samples(tmp_path / str(i))])
    first = [row["messages"][0]["content"] for row in toy.rows[:4]]
    assert asked[0] == asked[1] != asked[2] and sorted(asked[0]) != sorted(first)


def test_answers_from_before_are_kept_only_for_the_same_questions_and_base(toy, tmp_path, monkeypatch):
    made = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, **o: made.append(len(prompts)) or generate(self, prompts, **o))
    work = tmp_path / "run"
    tasks.train(toy.config(**SHORT), work)
    tasks.train(toy.config(**SHORT), work)
    assert made == [4, 4, 4]  # before and after; only after
    tasks.train(toy.config(**SHORT | {"eval.generate": 6}), work, force=True)
    assert made[3:] == [6, 6] and len(samples(work)) == 6
    other = worlds.make_base(tmp_path / "other", rms_norm_eps=1e-5)
    tasks.train(toy.config(**SHORT | {"eval.generate": 6, "model.path": str(other)}), work, force=True)
    assert made[5:] == [6, 6]


def test_answers_kept_in_another_form_are_made_again(toy, tmp_path):
    tasks.train(toy.config(**SHORT), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    for other in (kept["answers"], {"answers": kept["answers"]}):
        (tmp_path / "run" / FILE).write_text(json.dumps(other))
        tasks.train(toy.config(**SHORT), tmp_path / "run")
        assert json.loads((tmp_path / "run" / FILE).read_text()) == kept


def test_a_bfloat16_model_answers_with_its_adapter_beside_the_base(toy, tmp_path, monkeypatch):
    """Merged, an update smaller than the base's rounding would be lost."""
    asked = []
    monkeypatch.setattr(heldout, "answers", lambda engine, *_, **__: asked.append(engine.params) or [])
    job = Job(toy.config(**SHORT, **{"model.dtype": "bfloat16"}), tmp_path / "run")
    answers = Answers(job)
    answers.answer(tree.join(job.trainable, job.frozen), answers.questions)
    assert isinstance(asked[0]["layers"]["attn"]["q"]["kernel"], LowRank)


def test_several_devices_answer_as_one_does(toy, tmp_path):
    for name, mesh in (("one", {"mesh.data": 1}), ("many", {"mesh.data": 4, "mesh.fsdp": 2})):
        tasks.train(toy.config(**SHORT | {"train.steps": 1, "train.batch_size": 8} | mesh), tmp_path / name)
    assert [s["base"] for s in samples(tmp_path / "one")] == [s["base"] for s in samples(tmp_path / "many")]


def watched(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["answers"] for line in lines if line["kind"] == "sample"}


def test_answers_during_training_change_nothing_of_it(toy, tmp_path, monkeypatch):
    """The same losses and last answers as without; one compiled step; the answers are the model's of that moment."""
    compiled = []
    make = job.make_step
    monkeypatch.setattr(job, "make_step", lambda *a, **o: traced(make(*a, **o), compiled))
    keys = SHORT | {"train.steps": 4, "train.log_every": 1}
    plain = tasks.train(toy.config(**keys), tmp_path / "plain")
    told = tasks.train(toy.config(**keys | {"train.generate_every": 2}), tmp_path / "watched")
    assert len(compiled) == 2  # once a run
    assert samples(tmp_path / "plain") == samples(tmp_path / "watched")
    assert told["eval_loss"] == plain["eval_loss"] and told["test_loss"] == plain["test_loss"]
    now = watched(tmp_path / "watched")
    assert [*now] == [2, 4] and watched(tmp_path / "plain") == {}
    last = [{name: s[name] for name in ("prompt", "expected")} | {"text": s["tuned"]} for s in samples(tmp_path / "watched")]
    assert [{name: a[name] for name in ("prompt", "expected", "text")} for a in now[4]] == last
    page = (tmp_path / "watched" / "report.html").read_text()
    assert "Answers while it trained" in page and "Answers while it trained" not in (tmp_path / "plain/report.html").read_text()


def traced(step, calls):
    """`step`, which notes each time that it is traced."""

    def noting(*args):
        calls.append(1)
        return step(*args)

    return noting


def test_answers_during_training_are_forgotten_and_given_again_by_a_resume(toy, tmp_path):
    """Stopped after step 4, with a checkpoint of step 3: what was said at step 4 is said once."""
    keys = {"train.steps": 6, "train.save_every": 3, "train.eval_every": 0, "train.generate_every": 1, "eval.max_new_tokens": 4}
    code, log = worlds.live(toy.argv(tmp_path / "run", keys), tmp_path / "log", "at_step", 5, signal.SIGKILL)
    assert code == -signal.SIGKILL, log
    before = watched(tmp_path / "run")
    tasks.train(toy.config(**keys), tmp_path / "run")
    after = watched(tmp_path / "run")
    assert [*before] == [1, 2, 3, 4] and [*after] == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    tasks.train(toy.config(**keys), tmp_path / "whole")
    assert watched(tmp_path / "whole") == after


def test_the_metrics_that_are_asked_for_are_in_the_summary(toy, tmp_path):
    summary = tasks.train(toy.config(**SHORT | {"eval.metrics": ("chrf", "contains")}), tmp_path / "run")
    for name in ("exact_match", "chrf", "contains", "repeated", "overlong"):
        assert {name, f"{name}_before"} <= {*summary}
    assert "token_f1" not in summary
    with pytest.raises(UserError, match=r"--config.eval.metrics=bluu: no such metric.*did you mean bleu\?"):
        tasks.train(toy.config(**SHORT | {"eval.metrics": "bluu"}), tmp_path / "other")
