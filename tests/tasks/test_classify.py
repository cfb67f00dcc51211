"""A classifier's head, whole: it learns beside every method, resumes, comes out as transformers and PEFT read it, and goes on."""

import json
import shutil

import numpy as np
import pytest
import toy as worlds

import sftjax
from sftjax import cli, tasks
from sftjax.config import UserError
from sftjax.data.preview import preview
from sftjax.evaluate import classes
from sftjax.generate.open import open_engine
from sftjax.tasks.export import export

METHODS = {
    "lora": {},
    "qlora": {"model.quantize": "nf4"},
    "full": {"method": "full", "optim.lr": 3e-3},
    "freeze": {"method": "freeze", "freeze.last_n_layers": 1},
    "tokens": {"method": "tokens", "tokens.train": ("<tool>",)},
    "adapter": {"method": "adapter", "adapter.width": 8},
}
FORM = {"lora": "peft", "tokens": "peft", "adapter": "sftjax"}
STEPS, HALF = 8, 4
FRUIT, TOOLS = ("apple", "plum", "pear"), ("saw", "axe", "file")
TEXTS = ["one pear here", "an axe", "plum"]


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """`world(...)`: a config over 96 texts, of fruit or tools, a quarter of them tools."""
    root = tmp_path_factory.mktemp("classes")
    rows = [
        {"text": f"{i} {words[i % 3]}{'s' * (i % 2)}", "label": label}
        for label, words, n in (("fruit", FRUIT, 72), ("tool", TOOLS, 24))
        for i in range(n)
    ]
    data = worlds.write_rows(root / "things.jsonl", rows)

    def config(**changes):
        settings = {"task": "classify", "classify.by": "head", "data.format": "label", "data.train": (str(data),)}
        steps = {"train.steps": STEPS, "train.save_every": HALF, "train.eval_every": 0, "optim.lr": 1e-2}
        return toy.config(**settings | steps | changes)

    return config


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A LoRA run and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, tasks.train(world(), workdir)


@pytest.mark.parametrize("name", METHODS)
def test_method(name, world, tmp_path):
    """A head is new: every label is as likely as the other."""
    summary = tasks.train(world(**METHODS[name]), tmp_path / "run")
    assert summary["eval_loss_before"] == pytest.approx(np.log(2), abs=1e-5)
    assert summary["accuracy_before"] == pytest.approx(0.5)
    assert summary["eval_loss"] < 0.98 * summary["eval_loss_before"]
    assert export(tmp_path / "run", to=FORM.get(name, "hf"), out=tmp_path / "out") < 1e-3


def test_a_resumed_run_ends_as_an_uninterrupted_one(run, world, tmp_path):
    workdir, summary = run
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(world(), again)
    assert (resumed["eval_loss"], resumed["classes"]) == (summary["eval_loss"], summary["classes"])


def test_what_was_held_out_is_counted_and_reported(run):
    workdir, summary = run
    found = summary["classes"]
    assert found["labels"] == ["fruit", "tool"]
    assert sum(found["counts"].values()) == json.loads((workdir / "manifest.json").read_text())["data"]["train"]["rows"]
    counts = np.array(found["confusion"])
    assert counts.sum() == 10 and summary["accuracy"] == pytest.approx(np.trace(counts) / 10)
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    assert last["accuracy"] == pytest.approx(summary["accuracy"])  # the loss counts as the matrix does
    assert "Confusion: texts of a label" in (workdir / "report.html").read_text()


def test_ollama_is_given_no_head(run, tmp_path):
    with pytest.raises(UserError, match=r"--to=ollama: the model ends with a score head, .*; use --to=hf"):
        export(run[0], to="ollama", out=tmp_path / "out")


def test_transformers_says_the_same(run, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export(run[0], to="hf", out=tmp_path / "out")
    labels, probabilities = sftjax.classify(sftjax.load(tmp_path / "out"), TEXTS, batch_size=2)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = theirs(**batch).logits.softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, said, atol=1e-5)
    assert labels == [theirs.config.id2label[i] for i in said.argmax(-1)]


def test_peft_says_the_same(run, toy, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export(run[0], to="peft", out=tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(toy.base, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base.config.pad_token_id = tokenizer.pad_token_id
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    with torch.no_grad():
        said = theirs(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    ours = sftjax.load(toy.base, adapter=tmp_path / "out")
    assert ours.config.labels == ("fruit", "tool")
    found = [np.asarray(ours.logits(text)[0, -1]) for text in TEXTS]
    np.testing.assert_allclose(found, said, atol=1e-5)


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_a_head_goes_on_from_where_it_was(to, run, toy, world, tmp_path):
    workdir, first = run
    export(workdir, to=to, out=tmp_path / "out")
    start = {"model.path": str(tmp_path / "out")} if to == "hf" else {"model.adapter": str(tmp_path / "out")}
    second = tasks.train(world(**start, **{"train.steps": 2}), tmp_path / "run")
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss"], abs=1e-5)
    assert second["macro_f1_before"] == pytest.approx(first["macro_f1"])
    export(tmp_path / "run", to=to, out=tmp_path / "again")


def test_a_file_is_evaluated_with_intervals_and_what_a_head_has_no_use_for_is_refused(run, world, tmp_path, capfd):
    def told(*argv):
        with pytest.raises(SystemExit) as end:
            cli.main(["eval", f"--model={tmp_path / 'out'}", f"--data={data}", *argv])
        return end.value.code, capfd.readouterr()

    data = worlds.write_rows(
        tmp_path / "more.jsonl",
        [{"text": f"{i} {'apple' if i % 3 else 'saw'}", "label": "tool" if i % 5 == 0 else "fruit"} for i in range(30)],
    )
    export(run[0], to="hf", out=tmp_path / "out")
    code, (said, err) = told(f"--out={tmp_path / 'eval'}", "--batch-size=7")
    assert (code, err) == (0, "") and "macro-F1" in said
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert len((tmp_path / "eval" / "scores.jsonl").read_text().splitlines()) == found["rows"] == 30
    for name, of in found["figures"][0]["figures"].items():
        assert of["model"]["value"] == pytest.approx(found[name]), name
        assert of["model"]["low"] < of["model"]["value"] < of["model"]["high"], name
    (tmp_path / "file").write_text("")
    for argv, sentence in {
        "--rows=0": "--rows: ",
        "--max-new-tokens=512": "--max-new-tokens: ",
        "--temperature=0.5": "--temperature: ",
        "--stop=x": "--stop: ",
        "--seed=1": "--seed: ",
        "--config.data.max_length=64": "--config.data.max_length=64: has no effect with --model",
        "--config.data.template=chatml": "--config.data.template=chatml: a classifier reads its texts without one",
        "--batch-size=0": "--batch-size=0: needs at least 1",
        f"--out={tmp_path / 'file'}": f"--out={tmp_path / 'file'}: cannot be made or written",
    }.items():
        code, (_, err) = told(argv)
        assert code == 1 and err.startswith(f"sftjax eval: {sentence}"), (argv, err)


def test_rare_labels_count_more_where_they_are_to(world, tmp_path, capsys):
    given = {"classify.class_weights": {"tool": 3.0}}
    plain, weighed = (tasks.train(world(**c), tmp_path / str(len(c))) for c in ({}, given))
    assert weighed["classes"]["weights"] == [1.0, 3.0]
    recall = [s["classes"]["per_class"]["tool"]["recall"] for s in (plain, weighed)]
    assert recall[1] >= recall[0] and weighed["eval_loss"] != plain["eval_loss"]
    tasks.train(world(**{"classify.class_weights": "balanced", "train.steps": 1}), tmp_path / "balanced")
    counts = plain["classes"]["counts"]
    said = capsys.readouterr().out
    assert f"counts {sum(counts.values()) / 2 / counts['tool']:.3g}" in said


def test_a_long_text_is_cut_and_keeps_its_label(world, tmp_path):
    rows = [{"text": f"{'fruit' if i % 2 else 'tool'} {i} " + "and so on " * 20, "label": i % 2} for i in range(40)]
    data = worlds.write_rows(tmp_path / "long.jsonl", rows)
    summary = tasks.train(world(**{"data.train": (str(data),), "data.on_overlong": "truncate"}), tmp_path / "run")
    assert summary["classes"]["labels"] == ["0", "1"]
    assert summary["eval_loss"] < 0.5 * summary["eval_loss_before"]


def test_labels_as_answers_are_counted_before_and_after(world, tmp_path, capsys):
    changes = {"classify.by": "label", "eval.generate": 10, "eval.max_new_tokens": 6, "train.steps": 2}
    summary = tasks.train(world(**changes), tmp_path / "run")
    assert "2 labels of the training rows:" in capsys.readouterr().out
    found, samples = summary["classes"], [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert found["labels"] == ["fruit", "tool"] and sum(found["counts"].values()) > 60
    for end, key in (("tuned", "confusion"), ("base", "confusion_before")):
        counts = np.array(found[key])
        assert counts.shape == (2, 3) and counts.sum() == len(samples) == 10
        assert np.trace(counts) == sum(s[f"exact_{end}"] for s in samples)
        assert counts[:, 2].sum() == sum(s[end].strip() not in ("fruit", "tool") for s in samples)
    assert "no label</th>" in (tmp_path / "run" / "report.html").read_text()


def test_an_answer_that_is_no_label_is_a_miss_and_no_ones_gain():
    counts = classes.counted(["a", "a", "b"], ["a\n", "what?", "a"], ["a", "b"])
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0]]
    found = classes.scores(counts, ["a", "b"])
    assert found["accuracy"] == pytest.approx(1 / 3) and found["per_class"]["a"]["precision"] == 0.5
    assert found["macro_f1"] == pytest.approx(0.25)


def test_what_a_batch_counts_is_as_scikit_learn_has_it():
    counts = np.array([[5, 1, 0], [2, 2, 0], [0, 0, 0]])
    found = classes.scores(counts, "abc")
    assert found["accuracy"] == 0.7 and found["majority"] == 0.6
    a, b, c = (found["per_class"][label] for label in "abc")
    assert (a["precision"], a["recall"], a["f1"]) == pytest.approx((5 / 7, 5 / 6, 10 / 13))
    assert (b["precision"], b["recall"], b["count"]) == pytest.approx((2 / 3, 0.5, 4))
    assert c["f1"] == 0 and found["macro_f1"] == pytest.approx((10 / 13 + 4 / 7) / 2)


def test_a_preview_names_the_label(world, capsys):
    from rich.console import Console

    preview(world(), Console(width=100), rows=1)
    assert "label: " in capsys.readouterr().out


def label(rows, name):
    return [{"text": row, "label": name} for row in rows]


MISTAKES = {
    "is 'toy', none of the labels fruit, tool": ({}, {"data.eval": label(["a ball"], "toy")}),
    "has the label one alone; a classifier needs two": ({}, {"data.train": label(["a", "b"], "one")}),
    "'toy' is none of the labels fruit, tool": ({"classify.class_weights": {"toy": 2.0}}, {}),
    "needs none, balanced, or a number above 0": ({"classify.class_weights": {"tool": 0}}, {}),
    "means nothing with --config.task=classify and --config.classify.by=head": ({"loss.z_loss": 0.1}, {}),
    "means nothing with --config.classify.by=label": ({"classify.by": "label", "classify.class_weights": "balanced"}, {}),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(sentence, world, tmp_path):
    changes, data = MISTAKES[sentence]
    files = {key: (str(worlds.write_rows(tmp_path / f"{i}.jsonl", rows)),) for i, (key, rows) in enumerate(data.items())}
    with pytest.raises(UserError) as refused:
        tasks.train(world(**changes, **files), tmp_path / "run")
    assert sentence in str(refused.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_head_is_for_the_task_it_was_made_for(run, world, toy, tmp_path):
    export(run[0], to="hf", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"ends with a score head of 2 numbers .* trains one over the vocabulary"):
        tasks.train(toy.config(**{"model.path": str(tmp_path / "out")}), tmp_path / "run")
    export(run[0], to="peft", out=tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter: ends with a score head of 2 numbers .* trains one over the vocabulary"):
        tasks.train(toy.config(**{"model.adapter": str(tmp_path / "adapter")}), tmp_path / "run")
    with pytest.raises(UserError, match="generates no text"):
        open_engine(str(tmp_path / "out"))
    more = worlds.write_rows(tmp_path / "more.jsonl", label(["a"], "fruit") + label(["b"], "tool") + label(["c"], "toy"))
    with pytest.raises(UserError, match="is 'toy', none of the labels fruit, tool"):
        tasks.train(world(**{"model.path": str(tmp_path / "out"), "data.train": (str(more),)}), tmp_path / "run")
    with pytest.raises(UserError, match="has no score head"):
        sftjax.classify(sftjax.load(toy.base), TEXTS)
