"""Preferences, whole: every method starts as its own reference, lowers the loss, is exported, and goes on after a stop."""

import inspect
import json
import shutil

import jax
import pytest
import toy as worlds
from ml_collections import ConfigDict
from tiny import assert_trees_close

from sftjax import tasks, tree
from sftjax.config import UserError
from sftjax.losses import dpo, kto
from sftjax.losses.dpo import each_pair
from sftjax.losses.preference import DIVERGENCES, LOSSES, UNPAIRED
from sftjax.plan.flops import count
from sftjax.plan.step import open_dry
from sftjax.tasks.dpo import OPTIONS, options
from sftjax.tasks.evaluate import evaluate_run
from sftjax.tasks.export import export
from sftjax.tasks.job import Job
from sftjax.tasks.kto import options as kto_options
from sftjax.tasks.reference import cache_key, reference

METHODS = {
    "lora": {},
    "dora": {"lora.dora": True},
    "pissa": {"lora.init": "pissa", "lora.rank": 4},
    "qlora": {"model.quantize": "nf4"},
    "modules": {"lora.modules_to_save": ("lm_head",)},
    "adapter": {"method": "adapter", "adapter.width": 16},
    "tokens": {"method": "tokens", "tokens.train": ("<|im_start|>", "<|im_end|>", "<tool>"), "optim.lr": 0.1},
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze.last_n_layers": 1},
}
RESUMED = ("lora", "modules", "full", "freeze")  # without and with a reference that is kept
FORM = {"adapter": "sftjax", "full": "hf", "freeze": "hf"}
STEPS, HALF = 6, 3
LOG2 = pytest.approx(0.693147, abs=1e-5)
EVALUATED = ("eval_loss", "accuracy", "margin", "logps_chosen", "logps_rejected", "test_accuracy")
METRICS = {f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")} | {"rewards/margins"}


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """`world(task, ...)` is a config over 72 pairs, or as many answers: a colour is better than not to know."""
    root = tmp_path_factory.mktemp("preferences")
    pairs, labels = [], []
    for i in range(12):
        for x, y in worlds.COLOURS.items():
            prompt, good, bad = turn("user", f"{i}: what colour is {x}?"), turn("assistant", y), turn("assistant", "who knows?")
            pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
            labels.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)})
    data = {"dpo": worlds.write_rows(root / "pairs.jsonl", pairs), "kto": worlds.write_rows(root / "labels.jsonl", labels)}

    def config(task="dpo", **changes) -> ConfigDict:
        settings = {"task": task, "data.train": (str(data[task]),), "data.max_length": 128, "optim.lr": 1e-2}
        steps = {"train.steps": STEPS, "train.save_every": HALF, "train.eval_every": 0}
        return toy.config(**settings | steps | changes)

    return config


def evaluations(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize("name", METHODS)
def test_method(name, world, tmp_path):
    config = world(**METHODS[name])
    summary = tasks.train(config, tmp_path / "run")
    assert (summary["eval_loss_before"], summary["margin_before"]) == (LOG2, pytest.approx(0, abs=1e-4))
    assert summary["eval_loss"] < 0.9 * summary["eval_loss_before"]
    assert summary["accuracy"] > 0.5 and summary["margin"] > 0

    form = FORM.get(name, "peft")
    assert export(tmp_path / "run", to=form, out=tmp_path / "out") < 1e-3  # it raises where it is not what was trained
    if name not in RESUMED:
        return
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(config, again)
    assert {name: resumed[name] for name in EVALUATED} == {name: summary[name] for name in EVALUATED}
    export(again, to=form, out=tmp_path / "resumed")
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert written and all(f.read_bytes() == (tmp_path / "resumed" / f.name).read_bytes() for f in written)


def test_what_goes_on_from_an_adapter_is_held_to_that_adapter(world, tmp_path):
    """And to what was trained as a whole beside it."""
    tasks.train(world(**METHODS["modules"]), tmp_path / "first")
    export(tmp_path / "first", to="peft", out=tmp_path / "adapter")
    first = evaluations(tmp_path / "first")[-1]
    summary = tasks.train(world(**{"model.adapter": str(tmp_path / "adapter")}), tmp_path / "second")
    assert (summary["eval_loss_before"], summary["margin_before"]) == (LOG2, pytest.approx(0, abs=1e-4))
    assert summary["logps_chosen_before"] == pytest.approx(first["logps/chosen"], rel=1e-5)
    assert summary["eval_loss"] != summary["eval_loss_before"]
    export(tmp_path / "second", to="peft", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["lora", "modules", "freeze"])
def test_the_reference_takes_nothing_or_what_trains_once_more(name, world, tmp_path):
    job = Job(world(**METHODS[name]), tmp_path / "run")
    there = {id(x) for x in jax.tree.leaves((job.trainable, job.frozen))}
    refer = reference(job)
    params = tree.join(job.trainable, job.frozen)
    own = [x for x in jax.tree.leaves(refer(params)) if id(x) not in there]
    assert sum(x.size for x in own) == (0 if name == "lora" else tree.count(job.trainable))


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_without_a_reference_nothing_of_the_start_is_kept(loss, world, tmp_path):
    summary = tasks.train(world(**{"dpo.loss": loss, "method": "full", "optim.lr": 3e-3}), tmp_path / "run")
    assert summary["eval_loss"] < summary["eval_loss_before"]
    assert summary["margin_before"] != 0


def test_sft_beside_the_loss_keeps_the_chosen_answers_likely(world, tmp_path):
    alone, beside = (tasks.train(world(**{"dpo.sft_weight": w}), tmp_path / str(w)) for w in (0.0, 1.0))
    assert beside["eval_loss_before"] > alone["eval_loss_before"] == LOG2
    assert beside["logps_chosen"] > alone["logps_chosen"]


def test_kto(world, tmp_path):
    summary = tasks.train(world("kto"), tmp_path / "run")
    assert summary["eval_loss_before"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert (summary["margin_before"], summary["kl_before"]) == (0, 0)
    assert summary["margin"] > 0 and "accuracy" not in summary
    assert {*evaluations(tmp_path / "run")[-1]} >= METRICS | {"kl"}
    export(tmp_path / "run", to="peft", out=tmp_path / "out")


@pytest.mark.parametrize(
    "method, changes",
    [("lora", {"train.micro_batch": 1}), ("full", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2})],
    ids=["cut", "sharded"],
)
def test_a_batch_may_be_cut_and_sharded(method, changes, world, tmp_path):
    one, other = (tasks.train(world(method=method, **c), tmp_path / str(len(c))) for c in ({}, changes))
    for name in ("eval_loss", "margin", "accuracy", "logps_chosen", "logps_rejected"):
        assert other[name] == pytest.approx(one[name], rel=2e-3), name


def test_what_was_evaluated_is_told(world, tmp_path, capsys):
    summary = tasks.train(world(**{"train.eval_every": 2}), tmp_path / "run")
    first, *_, last = told = evaluations(tmp_path / "run")
    assert [line["step"] for line in told] == [0, 2, 4, 6]
    assert all({*line} >= METRICS | {"rewards/accuracies", "loss", "count"} for line in told)
    for name, metric in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("logps_chosen", "logps/chosen")):
        assert (summary[f"{name}_before"], summary[name]) == (first[metric], last[metric])
    assert summary["margin"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)
    said = capsys.readouterr().out
    assert f"before training: eval loss 0.6931, margin 0.000, accuracy 50.0 %, {first['count']:.0f} pairs" in said


PRECOMPUTED = [("dpo", "lora"), ("dpo", "modules"), ("dpo", "full"), ("kto", "dora")]


@pytest.mark.parametrize("task, name", PRECOMPUTED, ids=map(" ".join, PRECOMPUTED))
def test_a_precomputed_reference_says_what_the_live_one_says_and_keeps_no_model(task, name, world, tmp_path):
    def job(precomputed):
        made = Job(world(task, **METHODS[name], **{f"{task}.precompute_ref_log_probs": precomputed}), tmp_path / str(precomputed))
        kept = tree.count((made.trainable, made.frozen))
        refer = reference(made)
        assert tree.count((made.trainable, made.frozen)) - kept == (
            0 if precomputed or name in ("lora", "dora") else kept_twice(made)
        )
        loss = {"dpo": dpo, "kto": kto}[task](made.forward, reference=refer)
        moved = tree.join(jax.tree.map(lambda x: 1.02 * x + 0.01, made.trainable), made.frozen)
        return [jax.jit(loss)(moved, batch, None) for batch in (made.stream.batch(0), *made.held_out(made.splits.test))]

    def kept_twice(made):
        return tree.count(made.frozen["reference"])

    live, kept = job(False), job(True)
    assert_trees_close(kept, live, 1e-4)
    assert abs(float(live[0][2]["rewards/margins"])) > 1e-3  # it has moved


def test_a_precomputed_reference_is_made_again_where_anything_that_it_is_made_of_changes(world, tmp_path, capsys):
    wish = {"dpo.precompute_ref_log_probs": True, "data.cache_dir": str(tmp_path / "cache")}

    def made(name, **changes):
        job = Job(world(**wish | changes), tmp_path / name)
        reference(job)
        return job, "computed in" in capsys.readouterr().out.splitlines()[-1]

    job, first = made("first")
    assert first and not made("again")[1]
    assert not made("rank", **{"lora.rank": 2, "seed": 0})[1]  # what is left off changes nothing
    assert made("half", **{"model.dtype": "bfloat16"})[1]
    assert made("data", **{"data.max_length": 120, "seed": 3})[1]  # other rows on either side
    assert made("whole", method="full")[1]
    keys = {cache_key(job, job.splits.train)}
    for part in ("base", "adapter"):
        job.manifest["hashes"][part] = "another"
        keys.add(cache_key(job, job.splits.train))
    assert len(keys) == 3


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_held_out_prompts_are_answered_and_a_run_is_evaluated_as_training_evaluated_it(task, world, tmp_path):
    wish = {"method": "full", "optim.lr": 3e-3, "eval.generate": 4, "eval.max_new_tokens": 8, "train.generate_every": 3}
    wish |= {"eval.batch_size": 8, "dpo.precompute_ref_log_probs": task == "dpo"}  # all in one batch: KTO's means are of it
    summary = tasks.train(world(task, **wish), tmp_path / "run")
    samples = list(map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines()))
    assert 0 < len(samples) <= 4 and {s["expected"] for s in samples} <= {*worlds.COLOURS.values()}  # never a bad answer
    assert {"exact_match_before", "exact_match", "stop_rate"} <= {*summary}
    assert "Base against tuned" in (tmp_path / "run" / "report.html").read_text()

    found = evaluate_run(tmp_path / "run", rows=2, say=lambda _: None)
    figures = found["figures"][0]["figures"]
    named = {"loss": "eval_loss", "margin": "margin", "logps_chosen": "logps_chosen", "logps_rejected": "logps_rejected"}
    named |= {"preference_accuracy": "accuracy"} if task == "dpo" else {}
    found_eval = evaluate_run(tmp_path / "run", rows=0, split="eval", say=lambda _: None)["figures"][0]["figures"]
    for figure, name in named.items():
        if name != "accuracy":  # before training all margins are 0, but for rounding
            assert found_eval[figure]["base"]["value"] == pytest.approx(summary[f"{name}_before"], rel=1e-4, abs=1e-5), name
        assert found_eval[figure]["tuned"]["value"] == pytest.approx(summary[name], rel=1e-4, abs=1e-5), name
    if task == "dpo":
        export(tmp_path / "run", to="hf", out=tmp_path / "out")
    assert figures["loss"]["tuned"]["value"] == pytest.approx(summary["test_loss"], rel=1e-4)
    assert figures["loss"]["rows"] == found["rows"] and found["answered"] == 2 and "exact_match" in figures
    assert "log-prob, chosen" in (tmp_path / "run" / "report.html").read_text()


def test_a_plan_knows_that_nothing_is_kept_and_nothing_computed_twice(world):
    live, kept = (
        open_dry(world(method="full", **{"dpo.precompute_ref_log_probs": precomputed}), 128) for precomputed in (False, True)
    )
    assert tree.count(live.frozen) - tree.count(kept.frozen) == tree.count(live.trainable)
    assert len(kept.batch) == len(live.batch) + 1
    flops = [count(job.step, job.state, job.frozen, job.batch).flops for job in (live, kept)]
    assert flops[1] < 0.85 * flops[0]


REACHED = {  # option of a loss -> a config that wants it
    "label_smoothing": {"dpo.label_smoothing": 0.1, "dpo.loss": "aot"},
    "divergence": {"dpo.divergence": "js"},
    "alpha": {"dpo.alpha": 0.3, "dpo.divergence": "alpha"},
    "ld_alpha": {"dpo.ld_alpha": 0.5},
    "per_token": {"dpo.per_token": False, "dpo.loss": "ipo"},
    "tau": {"dpo.tau": 0.1, "dpo.loss": "discopop"},
    "shift": {"dpo.shift": True, "dpo.loss": "bco_pair"},
    "gamma": {"dpo.gamma": 1.0, "dpo.loss": "simpo"},
    "nll": {"dpo.nll": 0.5, "dpo.loss": "cpo"},
    "nll_by": {"dpo.nll_by": "token", "dpo.loss": {"sigmoid": 1.0, "sft": 0.2}},
    "prompt_nll": {"dpo.prompt_nll": True, "dpo.loss": "orpo"},
}


def test_every_option_of_every_loss_is_reached_from_the_config(toy):
    for name, changes in REACHED.items():
        assert options(toy.config(**{"task": "dpo"} | changes))[name] == changes[f"dpo.{name}"]
    own = [name for fn in (*LOSSES.values(), *DIVERGENCES.values(), each_pair) for name in inspect.signature(fn).parameters]
    passed = {"pairs", "beta", "log_u", "forward", "loss", "reference", "options"}
    assert {*own} - passed == {*OPTIONS} == {*REACHED}
    of_kto = {name for fn in UNPAIRED.values() for name in inspect.signature(fn).parameters}
    assert of_kto - {"answers", "desirable", "baseline"} == {*kto_options(toy.config(task="kto"))} - {"loss"}


def test_several_losses_add_up_with_their_weights(toy):
    mixed = options(toy.config(**{"task": "dpo", "dpo.loss": {"sigmoid": 1.0, "bco_pair": 0.5}, "dpo.sft_weight": 0.2}))
    assert mixed["loss"] == {"sigmoid": 1.0, "bco_pair": 0.5, "sft": 0.2}


MISTAKES = {
    "dpo.loss sigmod: not known; did you mean sigmoid?": {"dpo.loss": "sigmod"},
    "dpo.divergence: ipo does not use it": {"dpo.loss": "ipo", "dpo.divergence": "js"},
    "dpo.divergence jss: not known": {"dpo.divergence": "jss"},
    "dpo.label_smoothing=0.6: the loss robust": {"dpo.loss": "robust", "dpo.label_smoothing": 0.6},
    "dpo.label_smoothing=0.0: the loss exo_pair": {"dpo.loss": "exo_pair", "dpo.label_smoothing": 0.0},
    "dpo.ld_alpha=0.5: the loss sft": {"dpo.loss": "sft", "dpo.ld_alpha": 0.5},
    "dpo.sft_weight=0.2: the loss sft": {"dpo.loss": "sft", "dpo.sft_weight": 0.2},
    "dpo.sft_weight=0.3: the loss sft": {"dpo.loss": {"ipo": 1.0, "sft": 0.2}, "dpo.sft_weight": 0.3},
    "dpo.gamma: sigmoid does not use it": {"dpo.gamma": 1.0},
    "dpo.alpha: js does not use it": {"dpo.alpha": 0.3, "dpo.divergence": "js"},
    "dpo.nll_by: sigmoid does not use it": {"dpo.nll_by": "pair"},
    "dpo.prompt_nll: sigmoid has no term of likelihood": {"dpo.prompt_nll": True},
    "dpo.precompute_ref_log_probs: the loss orpo has no reference": {"dpo.loss": "orpo", "dpo.precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_in_the_loss_is_told_before_anything_is_there(sentence, world, tmp_path):
    with pytest.raises(UserError) as refused:
        tasks.train(world(**MISTAKES[sentence] | {"model.path": "no such base"}), tmp_path / "run")
    assert str(refused.value).startswith(sentence)
    assert not (tmp_path / "run").exists()
