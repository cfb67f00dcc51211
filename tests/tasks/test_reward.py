"""A reward model, whole: it starts undecided, learns pairs and rankings, resumes, and is scored as transformers scores it."""

import json
import shutil

import numpy as np
import pytest
import toy as worlds

import sftjax
from sftjax import tasks
from sftjax.config import UserError, default
from sftjax.evaluate.calibration import calibration, calibration_sums
from sftjax.tasks.export import export
from sftjax.tasks.scored import score_file
from sftjax.train.run import Run

METHODS = {"lora": {}, "full": {"method": "full", "optim.lr": 3e-3}}
STEPS, HALF = 6, 3
LOG2 = pytest.approx(np.log(2), abs=1e-5)


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """72 prompts: a colour is better than not to know; among four, to guess is as good as to ask, and not to answer worst."""
    root = tmp_path_factory.mktemp("preferences")
    pairs, rankings = [], []
    for i in range(12):
        for x, y in worlds.COLOURS.items():
            prompt = turn("user", f"{i}: what colour is {x}?")
            pairs.append({"prompt": prompt, "chosen": turn("assistant", y), "rejected": turn("assistant", "who knows?")})
            rankings.append({"prompt": f"{i} {x}?", "answers": [y, "maybe", "why?", "who knows?"], "ranks": [1, 2, 2, 3]})
    return {
        "bradley_terry": worlds.write_rows(root / "pairs.jsonl", pairs),
        "plackett_luce": worlds.write_rows(root / "rankings.jsonl", rankings),
    }


@pytest.fixture(scope="module")
def world(toy, data):
    def config(loss="bradley_terry", **changes):
        settings = {"task": "reward", "reward.loss": loss, "data.train": (str(data[loss]),), "optim.lr": 1e-2}
        steps = {"data.max_length": 128, "train.steps": STEPS, "train.save_every": HALF, "train.eval_every": 0}
        return toy.config(**settings | steps | changes)

    return config


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, tasks.train(world(), workdir)


@pytest.mark.parametrize("name", METHODS)
def test_method(name, world, tmp_path):
    summary = tasks.train(world(**METHODS[name]), tmp_path / "run")
    assert (summary["eval_loss_before"], summary["accuracy_before"], summary["margin_before"]) == (LOG2, 0.5, 0)
    assert summary["eval_loss"] < 0.9 * summary["eval_loss_before"]
    assert summary["accuracy"] > 0.9 and summary["margin"] > 0
    assert export(tmp_path / "run", to="peft" if name == "lora" else "hf", out=tmp_path / "out") < 1e-3


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, world, tmp_path):
    workdir, summary = run
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(world(), again)
    assert (resumed["eval_loss"], resumed["calibration"]) == (summary["eval_loss"], summary["calibration"])


def test_rankings_are_learnt_whole(toy, data, world, tmp_path):
    """Four answers, two of them alike, of which no more is asked than that both be between the others."""
    summary = tasks.train(world("plackett_luce", **{"train.steps": 12}), tmp_path / "run")
    start = np.log(4) + 2 * np.log(2)  # at zero: the first of four, then each of the two in the middle before the last
    assert summary["eval_loss_before"] == pytest.approx(start, abs=1e-4)
    assert summary["eval_loss"] < 0.8 * start and summary["accuracy"] > 0.8
    assert summary["calibration"]["pairs"] == 7 * 5  # pairs of four answers with one tie


def test_transformers_says_the_same(run, data, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export(run[0], to="hf", out=tmp_path / "out")
    model = sftjax.load(tmp_path / "out")
    conversations = [
        turn("user", f"{i}: what colour is snow?") + turn("assistant", said) for i, said in enumerate(("white", "?", "who"))
    ]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.num_labels == 1
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    with torch.no_grad():
        said = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    np.testing.assert_allclose(sftjax.rewards(model, conversations, batch_size=2), said, rtol=1e-4, atol=1e-4)

    found = score_file(model, str(data["bradley_terry"]), default(), place=Run(tmp_path / "eval"), say=print)
    assert found["pairs"] == 72 and found["accuracy"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "eval" / "scores.jsonl").read_text().splitlines()]
    assert found["margin"] == pytest.approx(np.mean([a - b for a, b in (line["rewards"] for line in lines)]), abs=1e-5)

    ranked = score_file(model, str(data["plackett_luce"]), default(), batch_size=5, say=print)
    for one in (found, ranked):
        for name, of in one["figures"][0]["figures"].items():
            assert of["rows"] == 72 and of["model"]["value"] == pytest.approx(one[name], abs=1e-5), name
            assert of["model"]["low"] <= of["model"]["value"] + 1e-6 and of["model"]["low"] <= of["model"]["high"], name
    margin = ranked["figures"][0]["figures"]["margin"]["model"]
    assert margin["low"] < margin["value"] < margin["high"]
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = default()
    config.data.template = str(plain)
    assert score_file(model, str(data["bradley_terry"]), config, say=print)["margin"] != found["margin"]


def test_a_reward_model_goes_on_and_its_padding_ends_no_sequence(run, world, tmp_path):
    workdir, first = run
    export(workdir, to="hf", out=tmp_path / "out")
    second = tasks.train(world(**{"model.path": str(tmp_path / "out"), "train.steps": 1}), tmp_path / "run")
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss"], abs=1e-5)


def test_what_is_as_often_right_as_it_is_sure_is_calibrated():
    sure = np.log(3.0)  # sigmoid: 0.75
    assert calibration(np.array([sure, sure, sure, -sure]))["ece"] == pytest.approx(0, abs=1e-9)
    assert calibration(np.array([sure, sure, sure, sure]))["ece"] == pytest.approx(0.25)
    assert calibration(np.zeros(4))["ece"] == 0  # undecided, and half right
    assert calibration(np.zeros(0)) == {}


def test_the_calibration_of_rows_is_that_of_their_pairs():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=n) for n in (3, 0, 1, 40)]
    sums = calibration_sums(rows)
    for some in ([0, 1, 2, 3], [0, 2], [3, 3, 0]):
        pairs = np.concatenate([rows[i] for i in some])
        assert sums.figure(sums.rows[some].sum(0)) == pytest.approx(calibration(pairs)["ece"])
    assert np.isnan(sums.figure(sums.rows[1]))


MISTAKES = {
    "--config.reward.margin=0.5: means nothing with --config.reward.loss=plackett_luce": {
        "reward.loss": "plackett_luce",
        "reward.margin": 0.5,
    },
    "--config.reward.centring=-1.0: needs at least 0": {"reward.centring": -1.0},
    "--config.reward.loss=bradley: needs one of bradley_terry, plackett_luce; did you mean bradley_terry?": {
        "reward.loss": "bradley"
    },
    "--config.loss.neftune_alpha=5.0: means nothing with --config.task=reward": {"loss.neftune_alpha": 5.0},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(sentence, world, tmp_path):
    with pytest.raises(UserError) as refused:
        tasks.train(world(**MISTAKES[sentence]), tmp_path / "run")
    assert str(refused.value).startswith(sentence)


def test_a_language_model_rewards_nothing(toy):
    with pytest.raises(UserError, match="a reward model has a score head of one number, this has none"):
        sftjax.rewards(sftjax.load(toy.base), [turn("user", "a")])
