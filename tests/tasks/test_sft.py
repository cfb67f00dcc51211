"""Every task and every method, as a user runs them: the loss falls, and what trains is what was asked for."""

import json
import shutil

import numpy as np
import pytest
import toy as worlds
from safetensors.numpy import load_file, save_file

from sftjax import tasks
from sftjax.config import UserError
from sftjax.data import pipeline
from sftjax.data.chat import load_tokenizer
from sftjax.sharding import make_mesh
from sftjax.tasks.base import Base
from sftjax.tasks.export import export

METHODS = {
    "lora": {},
    "lora with dropout, noise, smoothing": {
        "lora.dropout": 0.1,
        "loss.neftune_alpha": 5.0,
        "loss.label_smoothing": 0.05,
        "loss.z_loss": 1e-4,
    },
    "rslora of some": {"lora.rslora": True, "lora.targets": ("q_proj", "v_proj", "lm_head")},
    "full": {"method": "full", "optim.lr": 3e-3},
    "freeze all but the last layer": {"method": "freeze", "freeze.last_n_layers": 1, "optim.lr": 1e-2},
    "freeze all but the head": {"method": "freeze", "freeze.train": ("head",), "optim.lr": 5e-2},
}
# Hugging Face names of what each method may change
TOUCHED = {
    "lora": "proj",
    "lora with dropout, noise, smoothing": "proj",
    "rslora of some": ("q_proj", "v_proj", "lm_head"),
    "full": "",
    "freeze all but the last layer": "layers.2.",
    "freeze all but the head": "lm_head",
}


@pytest.mark.parametrize("name", METHODS)
def test_method_lowers_the_loss_and_changes_only_what_it_trains(toy, tmp_path, name):
    changes = METHODS[name] | {"train.steps": 8, "train.eval_every": 0, "train.log_every": 8}
    summary = tasks.train(toy.config(**changes), tmp_path / "run")
    assert summary["eval_loss"] < 0.8 * summary["eval_loss_before"]
    assert 0 < summary["trainable_parameters"] <= summary["parameters"]
    export(tmp_path / "run", out=tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (toy.base, tmp_path / "out"))
    wanted = (TOUCHED[name],) if isinstance(TOUCHED[name], str) else TOUCHED[name]
    changed = {tensor for tensor in before if before[tensor].tobytes() != after[tensor].tobytes()}
    assert changed == {tensor for tensor in before if any(w in tensor for w in wanted)}


def test_what_trains_is_a_table_that_fits_a_terminal(toy, tmp_path, capsys):
    changes = {"train.steps": 1, "train.eval_every": 0, "lora.targets": ("q_proj", "lm_head"), "tokens.train": "<tool>"}
    tasks.train(toy.config(**changes), tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(said) if line.split() == ["leaf", "shape", "trains", "share"])
    table, total = said[start : start + 4], said[start + 4]
    assert [line.split()[0] for line in table[1:]] == ["embed/embedding", "head/kernel", "layers/attn/q/kernel"]
    assert "[3, 32, 32]" in table[3]
    assert len({len(line) for line in table}) == 1 and len(table[0]) <= 80
    trained = sum(int(line.replace(",", "").split("  ")[-2]) for line in table[1:])
    assert total.startswith(f"training {trained:,} of ")
    shares = [float(line.split()[-2]) for line in table[1:]]  # of the model, so that they add up to the total's
    assert sum(shares) == pytest.approx(float(total.split("(")[1].split()[0]), abs=0.02)
    assert said[start + 5] == "new tokens <tool>: their rows start as the mean, and train"


TOKENS = {
    "beside LoRA": {},
    "alone": {"method": "tokens"},
    "beside LoRA on the head": {"lora.targets": ("q_proj", "lm_head")},
    "in pretraining": {"task": "pretrain"},
    "of a tied model": {"model.path": "tied"},
}


@pytest.mark.parametrize("name", TOKENS)
def test_only_the_rows_of_the_tokens_named_train(toy, tmp_path, name):
    """A new one and a known one, which the data has; every other row keeps its bits."""
    changes = {"train.steps": 4, "train.eval_every": 0, "tokens.train": "<tool>,x"} | TOKENS[name]
    if changes.get("model.path"):
        changes["model.path"] = str(worlds.make_base(tmp_path / "tied", tie_word_embeddings=True))
    turns = [("user", "<tool> x?"), ("assistant", "x is <tool>")]
    rows = [{"messages": [{"role": role, "content": f"{i}: {text}"} for role, text in turns]} for i in range(40)]
    if changes.get("task") == "pretrain":
        rows = [{"text": f"{i}: x is <tool>, not y. " * 3} for i in range(40)]
    changes["data.train"] = (str(worlds.write_rows(tmp_path / "rows.jsonl", rows)),)
    config = toy.config(**changes)
    tasks.train(config, tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (Base(config).directory, tmp_path / "out"))
    tokenizer = load_tokenizer(tmp_path / "out")
    new, known = tokenizer.convert_tokens_to_ids(["<tool>", "x"])
    for tensor in before.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        was, now = before[tensor], after[tensor]
        assert (new, len(now)) == (len(was), len(was) + 1)
        if "head" in name and tensor == "lm_head.weight":
            continue  # LoRA moves all of them
        assert np.flatnonzero((now[: len(was)] != was).any(1)).tolist() == [known]
        assert np.abs(now[new] - was.mean(0)).max() > 1e-3
    frozen = name == "alone"
    assert frozen == all(before[t].tobytes() == after[t].tobytes() for t in before if "proj" in t)


def test_an_adapters_tokenizer_and_template_go_before_the_bases(toy, tmp_path):
    short = {"train.steps": 2, "train.eval_every": 0}
    template = tmp_path / "mine.jinja"
    template.write_text(worlds.CHATML.replace("\n", " : "))
    tasks.train(toy.config(**short, **{"data.template": str(template)}), tmp_path / "first")
    export(tmp_path / "first", to="peft", out=tmp_path / "adapter")
    tokenizer = load_tokenizer(tmp_path / "adapter")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    config = toy.config(**short, **{"model.adapter": str(tmp_path / "adapter")})
    base = Base(config)
    assert base.chat.template == template.read_text() and "<tool>" in base.chat.tokenizer.get_vocab()
    tasks.train(config, tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    assert "<tool>" in load_tokenizer(tmp_path / "out").get_vocab()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()
    assert len(load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]) == len(tokenizer)
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    assert Base(config).chat.template == template.read_text() and "<tool>" not in Base(config).chat.tokenizer.get_vocab()
    with pytest.raises(UserError, match="the tokenizer is not what the run in"):
        export(tmp_path / "run", out=tmp_path / "other")


TEXTS = ["the grass is green and the snow is white. ", "coal is black, blood is red, and the sky is blue. "]


def test_pretraining_fills_rows_and_trains_every_token(toy, tmp_path):
    data = worlds.write_rows(tmp_path / "texts.jsonl", [{"text": f"{i} " + TEXTS[i % 2] * (1 + i % 4)} for i in range(60)])
    changes = {"task": "pretrain", "method": "full", "optim.lr": 3e-3, "data.train": (str(data),)}
    summary = tasks.train(toy.config(**changes), tmp_path / "run")
    assert summary["eval_loss"] < 0.7 * summary["eval_loss_before"]
    assert summary["tokens"] == 12 * 4 * 64  # every position of every row
    assert summary["trained_tokens"] > 0.97 * summary["tokens"]  # all but the first of each document
    assert "exact_match" not in summary
    export(tmp_path / "run", out=tmp_path / "out")


def test_classification_reads_text_and_label(toy, tmp_path):
    rows = [f"the {i}th {x},{y}" for i in range(12) for x, y in worlds.COLOURS.items()]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    changes = {
        "task": "classify",
        "data.train": (str(tmp_path / "rows.csv"),),
        "data.format": "label",
        "data.label_prompt": "colour of {text}:",
    }
    summary = tasks.train(toy.config(**changes), tmp_path / "run")
    assert summary["task"] == "classify"
    assert summary["eval_loss"] < 0.7 * summary["eval_loss_before"]


def test_held_out_prompts_are_answered_before_and_after(toy, tmp_path):
    changes = {"method": "full", "optim.lr": 5e-3, "train.steps": 60, "train.eval_every": 0, "train.log_every": 30}
    changes |= {"eval.generate": 6, "eval.max_new_tokens": 12}
    summary = tasks.train(toy.config(**changes), tmp_path / "run")
    assert summary["exact_match_before"] == 0
    assert summary["exact_match"] > 0.5
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    # a second call finds the run finished, and says the same of it
    again = tasks.train(toy.config(**changes), tmp_path / "run")
    assert {k: again[k] for k in ("exact_match_before", "exact_match")} == {
        k: summary[k] for k in ("exact_match_before", "exact_match")
    }


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model.path": ""}, "model.path is empty"),
        ({"train.batch_size": 6, "train.micro_batch": 4}, "train.batch_size=6 is no multiple of train.micro_batch=4"),
        (
            {"train.batch_size": 6, "mesh.data": 4, "mesh.tensor": 2},
            "batch_size=6 does not divide over 4 data shards; use a multiple of 4 or --config.mesh.data=1",
        ),
        (
            {"train.batch_size": 4, "mesh.data": 1, "mesh.fsdp": 8},
            "batch_size=4 does not divide over 8 data shards; use a multiple of 8 or --config.mesh.fsdp=1",
        ),
        ({"mesh.tensor": 4, "mesh.data": 2}, "mesh.tensor=4 does not divide the model's 2 key-value heads"),
        (
            {"train.batch_size": 8, "eval.batch_size": 6, "mesh.data": 4, "mesh.tensor": 2},
            "eval.batch_size=6 does not divide over 4 data shards; use a multiple",
        ),
        ({"data.max_length": 129}, "data.max_length=129 is more than the 128 positions of"),
        ({"data.max_length": 129}, "use --config.data.max_length=128"),
        ({"mesh.data": 3}, "mesh: data=3 does not make the 8 devices here"),
        ({"method": "freeze"}, "freeze: nothing trains; set --config.freeze.last_n_layers or --config.freeze.train"),
        ({"method": "freeze", "freeze.last_n_layers": 9}, "freeze.last_n_layers=9: the model has 3 layers"),
        ({"lora.targets": ("q_prj",)}, "did you mean q_proj"),
        ({"lora.rank": 0}, "--config.lora.rank=0: needs at least 1"),
        ({"optim.name": "adamW"}, "needs one of adamw, adamw_8bit, adam, sgd"),
        ({"train.batch_size": 0}, "--config.train.batch_size="),
        ({"train.log_every": 0}, "--config.train.log_every="),
        ({"train.steps": -1}, "--config.train.steps="),
        ({"data.max_length": 0}, "--config.data.max_length="),
        ({"model.adapter": "/nowhere", "method": "full"}, "means nothing with --config.method=full"),
        ({"lora.dropout": 1.0}, "--config.lora.dropout=1.0: needs a share"),
        ({"method": "tokens"}, "method=tokens: nothing trains; name tokens, e.g. --config.tokens.train="),
        ({"method": "full", "tokens.train": "x"}, "tokens.train: x is known, and --config.method=full trains every token"),
        (
            {"method": "freeze", "freeze.train": ("embed", "head"), "tokens.train": "x"},
            "tokens.train: x is known, and freeze.train trains every token",
        ),
        (
            {"lora.modules_to_save": ("embed_tokens", "lm_head"), "tokens.train": "x"},
            "tokens.train: x is known, and lora.modules_to_save trains every token",
        ),
        ({"model.revision": "main"}, "which has no revisions; leave it out"),
        ({"lora.rank_pattern": {"q_prj": 4}}, "lora.rank_pattern: nothing is named 'q_prj'; did you mean q_proj?"),
        ({"lora.rank_pattern": {"q_proj": 4, "(q|k)_proj": 8}}, "'(q|k)_proj' and 'q_proj' both name layers.self_attn.q_proj"),
        ({"lora.targets": ("v_proj",), "lora.rank_pattern": {"q_proj": 4}}, "'q_proj' names nothing that lora.targets does"),
    ],
)
def test_what_cannot_be_is_one_sentence(toy, tmp_path, changes, sentence):
    with pytest.raises(UserError) as told:
        tasks.train(toy.config(**changes), tmp_path / "run")
    assert sentence in str(told.value)
    assert not list((tmp_path / "run").glob("*"))


def test_a_name_mistyped_leaves_the_directory_to_the_name_mended(toy, tmp_path, monkeypatch):
    """And is told before the data is read."""
    read, build = [], pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args, **options: read.append(args) or build(*args, **options))
    short = {"train.steps": 1, "train.eval_every": 0}
    for changes in ({"lora.targets": ("q_prj",)}, {"lora.modules_to_save": "lm_haed"}, {"lora.init": "pissa", "lora.rank": 999}):
        with pytest.raises(UserError, match="lora"):
            tasks.train(toy.config(**short, **changes), tmp_path / "run")
    assert not read
    tasks.train(toy.config(**short), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, now, told",
    [
        ({"method": "tokens", "tokens.train": "a,b"}, {"tokens.train": "b,x"}, "trained tokens: .*a.* -> .*x"),
        (
            {"data.template": "chatml", "data.max_length": 128},
            {"data.template": "llama3"},
            r"trained tokens: \{\} -> .*eot_id",
        ),
        ({}, {"lora.alpha": 8.0}, "config.lora.alpha: 32.0 -> 8.0"),
        ({}, {"lora.rslora": True}, "config.lora.rslora: False -> True"),
    ],
)
def test_a_checkpoint_keeps_its_meaning_whatever_is_forced(toy, tmp_path, changes, now, told):
    """Rows of other tokens, or a LoRA of another scale, have the same shapes."""
    short = {"train.steps": 1, "train.eval_every": 0} | changes
    tasks.train(toy.config(**short), tmp_path / "run")
    with pytest.raises(UserError, match=f"would mean something else:\n  {told}.*\nuse another --workdir"):
        tasks.train(toy.config(**short | now), tmp_path / "run", force=True)
    tasks.train(toy.config(**short | {"optim.lr": 1e-5}), tmp_path / "run", force=True)


ADAPTERS = {
    "lora": {"lora.targets": ("q_proj", "lm_head")},
    "adapter": {"method": "adapter"},
    "tokens": {"method": "tokens", "tokens.train": "a,b"},
}


@pytest.fixture(scope="module")
def adapters(toy, tmp_path_factory):
    """A directory of each method's."""
    place = tmp_path_factory.mktemp("adapters")
    for name, changes in ADAPTERS.items():
        tasks.train(toy.config(**{"train.steps": 1, "train.eval_every": 0} | changes), place / "runs" / name)
        export(place / "runs" / name, to="sftjax" if name == "adapter" else "peft", out=place / name)
    return place


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("held", ADAPTERS)
def test_an_adapter_goes_on_by_its_own_method(toy, adapters, tmp_path, method, held):
    config = toy.config(**{"method": method, "model.adapter": str(adapters / held), "train.steps": 1, "train.eval_every": 0})
    if method != held:
        with pytest.raises(UserError, match=f"--config.method={method}: .* is of method {held}, .*use --config.method={held}"):
            Base(config)
        return
    assert tasks.train(config, tmp_path / "run")["trainable_parameters"]
    export(tmp_path / "run", to="sftjax" if held == "adapter" else "peft", out=tmp_path / "out")


def test_a_loaded_adapters_dropout_stays_off_the_head(toy, adapters, tmp_path):
    shutil.copytree(adapters / "lora", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.25}))
    _, params, _ = Base(toy.config(**{"model.adapter": str(tmp_path / "adapter")})).build(make_mesh(1, 1, 1))
    assert params["layers"]["attn"]["q"]["kernel"].dropout == 0.25
    assert params["head"]["kernel"].dropout == 0.0


def test_a_rate_for_lora_needs_one(toy, tmp_path):
    """Modules to save alone are an adapter of lora's without a LoRA."""
    head = load_file(toy.base / "model.safetensors")["lm_head.weight"]
    save_file({"base_model.model.lm_head.weight": head}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "modules_to_save": ["lm_head"]}))
    changes = {"model.adapter": str(tmp_path), "lora.lr_ratio": 16.0}
    with pytest.raises(UserError, match=r"lora\.lr_ratio=16\.0: .* holds no LoRA"):
        Base(toy.config(**changes))
    Base(toy.config(**changes | {"lora.lr_ratio": 1.0}))
