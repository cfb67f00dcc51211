"""GRPO, whole: log-probs are the model's, the loss is its definition, rewards rise, and resuming changes nothing."""

import json
import logging
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy as worlds

from sftjax import tasks, tree
from sftjax.config import UserError
from sftjax.data import pipeline
from sftjax.data.batch import Batch
from sftjax.data.chat import without_thought
from sftjax.data.prompts import Prompts
from sftjax.evaluate.heldout import Question
from sftjax.generate.engine import Engine, Generated
from sftjax.losses.policy import action_logps, grpo, logps_and_entropy
from sftjax.models.decoder import Output
from sftjax.tasks import rollouts
from sftjax.tasks.evaluate import evaluate
from sftjax.tasks.grpo import experience
from sftjax.tasks.job import Job
from sftjax.tasks.rewards import Answered, Rewards, table
from sftjax.tasks.rollouts import Actor, in_parts
from sftjax.train.run import read_metrics

STEPS, HALF, P, G = 8, 4, 2, 4
MINE = """from __future__ import annotations
from dataclasses import dataclass; import numpy as np
def vowels(prompts, completions, number, **columns):
    assert all(p.startswith(str(n)) for p, n in zip(prompts, number))
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]

def short(completions): return [1.0]
def words(completions): return ["good" for _ in completions]
def broken(completions): return [1 / 0 for _ in completions]
def later(completions): yield 1 / 0
def text(completions): return np.array(["good"] * len(completions))
def typed(*args, completions): return (Typed(1.0).reward for _ in completions)
@dataclass
class Typed:
    reward: float
def wants(solution): return solution
"""


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{i}: {x}?", "answer": y, "number": i} for i in range(12) for x, y in worlds.COLOURS.items()]
    data = worlds.write_rows(root / "prompts.jsonl", rows)
    (root / "mine.py").write_text(MINE)

    def config(**changes):
        settings = {
            "task": "grpo",
            "data.train": (str(data),),
            "grpo.rewards": (f"{root}/mine.py:vowels", "length:6"),
            "grpo.max_completion_length": 8,
            "grpo.num_generations": G,
            "train.batch_size": P * G,
            "train.steps": STEPS,
            "train.save_every": HALF,
            "train.eval_every": 0,
            "optim.lr": 4e-3,
        }
        return toy.config(**settings | changes)

    config.root, config.data = root, data
    return config


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run of two updates for each of two mini-batches a step, with its log of what was compiled."""
    compiled: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    workdir = tmp_path_factory.mktemp("run") / "run"
    with jax.log_compiles(True):
        summary = tasks.train(several(world), workdir)
    logger.removeHandler(handler)
    return workdir, summary, compiled


def several(world, **changes):
    return world(**{"grpo.num_iterations": 2, "grpo.num_mini_batches": 2, **changes})


def lines(workdir):
    """What is logged of steps, without the clock."""
    clock = ("seconds/", "tokens_per_s", "time", "kind")
    return [
        {k: v for k, v in line.items() if not k.startswith(clock)}
        for line in read_metrics(workdir / "metrics.jsonl")
        if line["kind"] == "train"
    ]


def test_rewards_rise_and_are_told(run):
    workdir, summary, _ = run
    assert summary["reward"] > summary["reward_before"] + 0.1, (summary["reward_before"], summary["reward"])
    assert summary["best"]["reward"] == summary["reward"]
    train = lines(workdir)
    assert [line["step"] for line in train] == [*range(1, STEPS + 1)]
    told = {"reward", "reward_std", "rewards/vowels", "rewards/length", "kl", "entropy", "clip_fraction", "length", "stopped"}
    assert all(told <= line.keys() for line in train)
    for line in train:
        assert line["reward"] == pytest.approx(line["rewards/vowels"] + line["rewards/length"])
    assert train[-1]["lr"] < train[0]["lr"]  # of iterations: all four updates of the first have its rate
    assert set(summary["seconds_a_step"]) == {"rollout", "score", "learn"}
    assert "Reward" in (workdir / "report.html").read_text()


def test_compiled_once(run):
    compiled = [line for line in run[2] if line.startswith("Compiling jit(step)")]
    assert len(compiled) == 1, compiled


def test_resumed_equals_uninterrupted(run, world, tmp_path):
    workdir, summary, _ = run
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(several(world), again)
    assert resumed["reward"] == summary["reward"] and resumed["kl"] == summary["kl"]
    assert lines(again) == lines(workdir)
    assert (again / "samples.jsonl").read_text() == (workdir / "samples.jsonl").read_text()


def test_a_run_that_has_ended_run_again_leaves_what_it_left(run, world, tmp_path):
    workdir, _, _ = run
    again = shutil.copytree(workdir, tmp_path / "again")
    before = json.loads((again / "summary.json").read_text())
    after = tasks.train(several(world), again)
    assert (again / "samples.jsonl").read_text() == (workdir / "samples.jsonl").read_text() != ""
    assert after["reward"] == before["reward"] and after["steady_tokens_per_s"] == before["steady_tokens_per_s"]


@pytest.fixture(scope="module")
def job(world, tmp_path_factory):
    return Job(world(**{"grpo.temperature": 0.7}), tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def acted(job):
    """(actor, params, answers): of the model as a run begins."""
    actor = Actor(job, job.config.grpo, Rewards("exact_match"))
    params = tree.join(job.trainable, job.frozen)
    return actor, params, actor.sample(params, job.splits.train, np.array([3, 7]), step=5, samples=G)


def test_rollouts_have_the_models_log_probs(job, acted):
    """Those of the policy that samples, which is the model at that temperature; before training it is its own reference."""
    actor, params, answers = acted
    batch = actor.batch(answers)
    assert batch.tokens.shape == (P * G, actor.length) and {len(a.ids) for a in answers} <= set(range(1, 9))
    with jax.set_mesh(job.mesh):
        ours = in_parts(job, partial(action_logps, actor.forward))(params, batch)
    output = job.forward(params, jax.tree.map(jnp.asarray, batch))
    whole = jax.nn.log_softmax((output.hidden @ output.head).astype(jnp.float32) / 0.7)
    for row, a in enumerate(answers):
        at = np.flatnonzero(batch.weights[row])
        assert batch.tokens[row, at].tolist() == a.ids
        np.testing.assert_allclose(ours[row, at], whole[row, at - 1, a.ids], atol=1e-4)
    rollouts = experience(batch, np.arange(8.0).reshape(P, G), np.ones(8, bool), job.config.grpo)._replace(reference=ours)
    _, n, metrics = grpo(actor.forward, beta=0.1, fresh=True)(params, jax.tree.map(jnp.asarray, rollouts))
    assert abs(metrics["kl"] / n) < 1e-6 and metrics["clip_fraction"] == 0


def test_the_policys_own_arrays_answer(job, acted):
    _, params, answers = acted
    kernel = tree.flatten(params)["layers/attn/q/kernel"]
    shared = tree.flatten(Engine(job.decoder, params, share=True).params)["layers/attn/q/kernel"]
    assert shared.a is kernel.a and shared.base is kernel.base
    assert len({tuple(a.ids) for a in answers[:G]}) > 1  # each answer has its own randomness
    for a in answers:
        assert a.stopped == (a.ids[-1] in job.stop_ids)


def test_a_thought_earns_and_shows_nothing(job, monkeypatch):
    raw = "<think>\n\n</think>\n\n7"
    made = Generated(job.chat.tokenise(raw)[0], True, raw)
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, **_: [made] * len(prompts))
    actor = Actor(job, job.config.grpo, lambda answers: (np.array([a.said == "7" for a in answers], float), {}))
    assert actor.evaluate(job.trainable, "eval")["reward"] == 1
    assert {a["text"] for a in actor.now} == {"7"}


def test_of_layers_in_two_stacks_answers_are_made_in_one_dtype(world, tmp_path, monkeypatch):
    """The last one trains in float32: joined as they are, all would be."""
    job = Job(world(method="freeze", **{"freeze.last_n_layers": 1, "model.dtype": "bfloat16"}), tmp_path / "run")
    given = []
    monkeypatch.setattr(
        rollouts, "Engine", lambda model, params, **options: given.append(params) or Engine(model, params, **options)
    )
    actor = Actor(job, job.config.grpo, Rewards("exact_match"))
    actor.sample(tree.join(job.trainable, job.frozen), job.splits.train, np.array([3]), step=0)
    kernels = [x for path, x in tree.flatten(given[0]["layers"]).items() if path.endswith("kernel")]
    assert "lower" not in given[0] and {x.dtype for x in kernels} == {jnp.dtype("bfloat16")}


def test_prompts_come_once_an_epoch(job, world):
    for seed in (0, 1):
        stream = Prompts(job.splits.train, world(seed=seed))
        n = len(job.splits.train)
        asked = np.concatenate([stream.batch(step) for step in range(2 * n // P)])
        assert sorted(asked[:n]) == sorted(asked[n : 2 * n]) == list(range(n))
        assert not np.array_equal(asked[:n], asked[n : 2 * n])
    assert stream.epoch(n // P) == pytest.approx(1, abs=0.05)


def test_rows_may_only_ask(world, job, tmp_path):
    """Every way to put a question is read; what the row has beside it goes to the reward functions."""
    rows = [
        {"prompt": "red?", "solution": "1", "level": 3},
        {"question": "red?", "level": 3},
        {"messages": [{"role": "user", "content": "red?"}], "level": 3},
        {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "1"}], "level": 3},
        {"prompt": [{"role": "user", "content": "red?"}], "level": 3},
    ]
    ids = set()
    for i, row in enumerate(rows):
        data = worlds.write_rows(tmp_path / f"{i}.jsonl", [row, row | {"level": 4}])
        splits = pipeline.build(world(**{"data.train": (str(data),), "data.split": (1,)}), job.chat, say=lambda _: None)
        example = splits.train.example(0)
        assert example.columns and example.columns["level"] == 3 and "messages" not in example.columns
        ids.add(tuple(splits.train.row(0)[0].tolist()))
    assert ids == {tuple(job.chat.prompt([{"role": "user", "content": "red?"}]))}


def test_prompts_too_long_are_dropped_and_counted(world, job, tmp_path):
    data = worlds.write_rows(tmp_path / "p.jsonl", [{"prompt": "why? " * n, "answer": "x"} for n in (1, 2, 30)])
    config = world(**{"data.train": (str(data),), "data.split": (1,)})
    splits = pipeline.build(config, job.chat, say=lambda _: None)
    assert splits.report["dropped"] == {"overlong": 1} and splits.report["kept"] == 2
    with pytest.raises(UserError, match="leaves no room for the prompt"):
        pipeline.build(world(**{"grpo.max_completion_length": 64}), job.chat, say=lambda _: None)


# -- the loss


def toy_rollouts(rng, n=8, T=12):
    mask = np.zeros((n, T), np.float32)
    for row in mask:
        row[2 : rng.integers(4, T)] = 1
    old, reference = rng.normal(-2, 0.3, (2, n, T)).astype(np.float32)
    return mask, old, reference, rng.integers(0, 9, (n, T))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_of_a_group_is_its_definition(world, loss_type):
    """-min(rho A, clip(rho) A) + beta (pi_ref / pi - log(pi_ref / pi) - 1), token by token, by numpy."""
    rng = np.random.default_rng(0)
    mask, old, reference, tokens = toy_rollouts(rng)
    rewards = rng.normal(size=(2, 4))
    hidden, head = rng.normal(size=(8, 12, 5)).astype(np.float32), rng.normal(size=(5, 9)).astype(np.float32)
    c = world(**{"grpo.loss_type": loss_type, "grpo.max_completion_length": 20}).grpo
    ones = np.ones((8, 12), np.int32)
    batch = worlds_batch(tokens, mask, ones)
    rollouts = experience(batch, rewards, np.ones(8, bool), c)._replace(logps=old, reference=reference)
    total, n, _ = grpo(lambda *_: Output(jnp.asarray(hidden), jnp.asarray(head)), high=0.3, beta=0.1)(
        {}, jax.tree.map(jnp.asarray, rollouts)
    )
    logits = hidden @ head
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, weights = 0.0, 0.0
    for i in range(8):
        group = rewards[i // 4]
        A = (rewards.flat[i] - group.mean()) / (group.std(ddof=1) + 1e-4)
        length = mask[i].sum()
        per = {"grpo": 1 / length, "dapo": 1, "dr_grpo": 1 / 20}[loss_type]
        weights += {"grpo": 1, "dapo": length, "dr_grpo": 1}[loss_type]
        for t in np.flatnonzero(mask[i]):
            logp = logps[i, t - 1, tokens[i, t]]
            rho, r = np.exp(logp - old[i, t]), np.exp(reference[i, t] - logp)
            expected += per * (-min(rho * A, np.clip(rho, 0.8, 1.3) * A) + 0.1 * (r - np.log(r) - 1))
    np.testing.assert_allclose(total / n, expected / weights, rtol=1e-4)


def worlds_batch(tokens, mask, ones):
    return Batch(tokens.astype(np.int32), mask, ones, np.broadcast_to(np.arange(mask.shape[1]), mask.shape))


def test_an_answer_that_was_cut_off_may_be_left_out(world):
    rng = np.random.default_rng(1)
    mask, _, _, tokens = toy_rollouts(rng)
    stopped = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
    batch = worlds_batch(tokens, mask, np.ones((8, 12), np.int32))
    rewards = rng.normal(size=(2, 4))
    kept = experience(batch, rewards, stopped, world(**{"grpo.mask_truncated_completions": True}).grpo)
    assert not kept.weights[~stopped].any() and (kept.weights[stopped] > 0).any(1).all()
    rloo = experience(batch, rewards, stopped, world(**{"grpo.advantage": "rloo"}).grpo)
    others = np.array([[np.delete(group, i).mean() for i in range(4)] for group in rewards])
    np.testing.assert_allclose(rloo.advantages.max(1) + rloo.advantages.min(1), (rewards - others).ravel(), rtol=1e-4)


def test_entropy_is_that_of_the_tokens():
    rng = np.random.default_rng(2)
    hidden, head = rng.normal(size=(2, 6, 4)).astype(np.float32), rng.normal(size=(4, 7)).astype(np.float32)
    logps, entropy = logps_and_entropy(jnp.asarray(hidden), jnp.asarray(head), jnp.zeros((2, 6), jnp.int32))
    p = np.asarray(jax.nn.softmax(hidden @ head))
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(logps, np.log(p[..., 0]), rtol=1e-4)


def test_how_a_step_is_cut_changes_nothing(world, run, tmp_path):
    """Micro-batches of an update, and devices along data: the same answers, and the same step."""
    config = {"train.steps": 1, "train.save_every": 0, "data.split": (1,)}
    whole = tasks.train(world(**config), tmp_path / "whole")
    tasks.train(world(**config, **{"train.micro_batch": 2}), tmp_path / "cut")
    tasks.train(world(**config, **{"mesh.data": 8}), tmp_path / "sharded")
    assert whole["steps"] == 1
    (first,) = lines(tmp_path / "whole")
    for name in ("cut", "sharded"):
        (line,) = lines(tmp_path / name)
        assert line == pytest.approx(first, rel=2e-3, abs=1e-5), name


# -- rewards


def answered(text, expected=None, ids=(1, 2, 3), **columns):
    return Answered(Question([1], "q", expected, where="f.jsonl:1"), columns, list(ids), True, text, without_thought(text))


def test_rewards_by_name(world):
    answers = [answered("7", "7"), answered("the answer is 7", "7", ids=range(6)), answered("x", None)]
    total, each = Rewards(("exact_match", "numeric", r"format:\d+", "length:4"), (1, 1, 0.5, 2))(answers)
    np.testing.assert_array_equal(each["exact_match"], [1, 0, np.nan])
    np.testing.assert_array_equal(each["numeric"], [1, 1, np.nan])
    np.testing.assert_array_equal(each["format"], [1, 0, 0])
    np.testing.assert_allclose(each["length"], [0.75, 0.5, 0.75])
    np.testing.assert_allclose(total, [1 + 1 + 0.5 + 1.5, 0 + 1 + 0 + 1, 1.5])
    np.testing.assert_array_equal(Rewards(f"{world.root}/mine.py:typed")(answers)[0], [1, 1, 1])
    thought = [answered("<think>\n8?\n</think>\n\n7", "7")]  # as TRL's, a format is of all that was written
    _, each = Rewards(("exact_match", "format:<think>.*</think>.*"))(thought)
    assert each == {"exact_match": [1], "format": [1]}
    told = {name: texts[0] for name, texts in table(thought).items() if name in ("said", "completions")}
    assert told == {"said": "7", "completions": thought[0].text}


MISTAKES = {
    "grpo.rewards names no reward function": (),
    "--config.grpo.rewards=exact: is no reward function; there are exact_match, contains": ("exact",),
    "grpo.reward_weights: 2 weights for the 1 functions": ("exact_match", (1, 2)),
    "--config.grpo.rewards=format:(: is no regular expression": ("format:(",),
    "--config.grpo.rewards=length:x: needs a number of tokens": ("length:x",),
    "--config.grpo.rewards=nowhere.py:f: no such file": ("nowhere.py:f",),
    "has no function nothing": ("MINE:nothing",),
    "short: returned 1 rewards for 2 answers": ("MINE:short",),
    "words: its reward for answer 1 is 'good', must be a finite number or None": ("MINE:words",),
    "text: its reward for answer 1 is": ("MINE:text",),
    "grpo.rewards: exact_match is named twice; name it once": (("exact_match", "numeric", "exact_match"), (1, 0, 5)),
    "grpo.rewards: takes a function by its file": (len,),
    "--config.grpo.reward_weights=nan: needs numbers, e.g. 1,0.5": ("exact_match", "nan"),
    "--config.grpo.rewards=length:²: needs a number of tokens": ("length:²",),
    "mine.py:9: broken failed: ZeroDivisionError: division by zero": ("MINE:broken",),
    "mine.py:10: later failed: ZeroDivisionError: division by zero": ("MINE:later",),
    "mine.py:wants: asks for solution, and the rows have number, prompts": ("MINE:wants",),
    "f.jsonl:1: none of the reward functions (exact_match) has a reward": ("exact_match",),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_in_rewards_is_told_in_a_sentence(sentence, world):
    specs, weights = (*MISTAKES[sentence], (), ())[:2] if MISTAKES[sentence] else ((), ())
    specs = specs.replace("MINE", str(world.root / "mine.py")) if isinstance(specs, str) else specs
    with pytest.raises(UserError) as refused:
        Rewards(specs, weights)([answered("a", number=1), answered("b", number=2)])
    assert sentence in str(refused.value)


def test_a_function_by_a_path_from_here_fails_by_its_line_too(world, monkeypatch):
    monkeypatch.chdir(world.root)
    with pytest.raises(UserError, match=r"^mine\.py:9: broken failed"):
        Rewards("mine.py:broken")([answered("a")])


def test_a_mistake_is_told_before_anything_runs(world, tmp_path):
    for sentence, changes in {
        "is no multiple of grpo.num_generations=3": {"grpo.num_generations": 3},
        "is no multiple of grpo.num_mini_batches=3": {"grpo.num_mini_batches": 3},
        "makes updates of 4 answers, which do not divide over 8 data shards": {"grpo.num_mini_batches": 2, "mesh.data": 8},
        "--config.grpo.scale_rewards=batch: means nothing with --config.grpo.advantage=rloo": {
            "grpo.scale_rewards": "batch",
            "grpo.advantage": "rloo",
        },
        "--config.data.on_overlong=truncate: a prompt that is cut short": {"data.on_overlong": "truncate"},
    }.items():
        with pytest.raises(UserError) as refused:
            tasks.train(world(**changes), tmp_path / "run")
        assert sentence in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_reward_function_under_the_same_name_is_another_run(world, tmp_path):
    own = shutil.copy(world.root / "mine.py", tmp_path / "own.py")
    config = world(**{"grpo.rewards": f"{own}:vowels", "train.steps": 1})
    tasks.train(config, tmp_path / "run")
    with open(own, "a") as file:
        file.write("vowels = lambda completions: [0.0 for _ in completions]\n")
    with pytest.raises(UserError, match="rewards: contents changed"):
        tasks.train(config, tmp_path / "run")


def test_evaluating_a_run_says_what_training_said_of_its_test_rows(world, tmp_path):
    """Of rows that expect what the model says before training."""
    rows = [json.loads(line) for line in (world.root / "prompts.jsonl").read_text().splitlines()]
    settings = {"grpo.rewards": "exact_match", "train.steps": 2, "data.split": (6, 2, 2)}
    tasks.train(world(**settings), tmp_path / "first")
    evaluate(tmp_path / "first")
    said = [json.loads(line) for line in (tmp_path / "first" / "eval" / "predictions.jsonl").read_text().splitlines()]
    expected = {one["prompt"]: one["base"] for one in said}
    data = worlds.write_rows(tmp_path / "more.jsonl", [row | {"answer": expected.get(row["prompt"], "x")} for row in rows])
    summary = tasks.train(world(**settings, **{"data.train": (str(data),)}), tmp_path / "run")
    found = evaluate(tmp_path / "run")
    figures = found["figures"][0]["figures"]
    assert found["answered"] == found["rows"] == len(said) and {"loss", "perplexity"}.isdisjoint(figures)
    assert figures["exact_match"]["base"]["value"] == 1 > figures["exact_match"]["tuned"]["value"]
    assert figures["exact_match"]["tuned"]["value"] == pytest.approx(summary["test_reward"])
    assert f"test rows: the answers of {found['rows']}." in (tmp_path / "run" / "report.html").read_text()


def test_samples_have_what_was_said_before_and_after(run):
    rows = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
    assert rows and {"prompt", "expected", "base", "tuned", "reward_base", "reward_tuned"} <= rows[0].keys()
    assert np.mean([row["reward_tuned"] for row in rows]) == pytest.approx(run[1]["reward"])
