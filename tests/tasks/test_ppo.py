"""PPO, whole: four models over one base, an iteration as it is defined, and a run that goes on where it was killed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy as worlds

import sftjax
from sftjax import tasks, tree
from sftjax.config import UserError
from sftjax.evaluate.heldout import Question, question
from sftjax.evaluate.sequences import score
from sftjax.hf.peft_read import base_of
from sftjax.losses import ppo
from sftjax.losses.policy import action_logps_and_entropy
from sftjax.losses.ppo import Played
from sftjax.models.decoder import Output
from sftjax.tasks.critics import Apart, Judge, add_value
from sftjax.tasks.evaluate import evaluate
from sftjax.tasks.export import export
from sftjax.tasks.job import Job
from sftjax.tasks.ppo import iteration
from sftjax.tasks.reference import reference
from sftjax.tasks.rewards import Answered
from sftjax.train.step import init_state, make_step, over_minibatches
from sftjax.weights.lora import without

STEPS, HALF = 4, 2
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def judges(toy, tmp_path_factory):
    """A reward model over the toy's base: as an adapter and as a checkpoint."""
    root = tmp_path_factory.mktemp("judges")
    pairs = [{"prompt": f"{i}: {x}?", "chosen": y, "rejected": "who knows?"} for i in range(6) for x, y in worlds.COLOURS.items()]
    settings = {"task": "reward", "data.train": (str(worlds.write_rows(root / "pairs.jsonl", pairs)),), "data.max_length": 128}
    tasks.train(toy.config(**settings | {"train.steps": 3, "train.eval_every": 0, "optim.lr": 1e-2}), root / "run")
    for form, name in (("peft", "adapter"), ("hf", "whole")):
        export(root / "run", to=form, out=root / name)
    return {name: root / name for name in ("adapter", "whole")}


@pytest.fixture(scope="module")
def world(toy, judges):
    """`world(...)`: the toy's questions, answered in eight tokens at most and judged by the adapter."""

    def config(**changes):
        settings = {"task": "ppo", "ppo.rewards": f"model:{judges['adapter']}", "ppo.max_completion_length": 8, "lora.rank": 4}
        settings |= {"ppo.kl_target": 0.01, "ppo.kl_horizon": 20.0, "ppo.num_ppo_epochs": 2, "ppo.num_mini_batches": 2}
        steps = {"train.steps": STEPS, "train.save_every": HALF, "train.eval_every": 0, "train.log_every": 1, "optim.lr": 1e-3}
        return toy.config(**settings | steps | changes)

    return config


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ppo") / "run"
    return workdir, tasks.train(world(), workdir)


def lines(workdir):
    """What was measured of each step; not how long it took."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "tokens_per_s"))} for line in found]


def buffers(params):
    return {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(params)}


def policy(params, batch, key=None):
    return Output(jnp.tanh(params["policy"][batch.tokens]), params["head"])


def value(params, batch, key=None):
    return Output(jnp.tanh(params["value"][batch.tokens]), params["score"])


def test_an_iteration_is_the_loop_that_the_paper_draws(world):
    """Two epochs of two minibatches over one batch of experience, a step of SGD each; then the controller's."""
    c, rate, seed = world().ppo, 0.1, 3
    shapes = {"policy": (64, 6), "head": (6, 64), "value": (64, 6), "score": (6, 1)}
    params = {name: jnp.asarray(RNG.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    batch = tiny.batch([[9], [7], [8], [9]], 9)
    mask = np.zeros((4, 9), np.float32)
    for row, (start, end) in enumerate([(3, 9), (2, 7), (6, 8), (4, 9)]):
        mask[row, start:end] = 1
    batch = batch._replace(weights=jnp.asarray(mask))
    logps, entropy = action_logps_and_entropy(policy, params, batch)
    apart = jnp.asarray(0.1 * RNG.standard_normal(mask.shape), jnp.float32)
    scores = ppo.at_the_end(jnp.asarray(RNG.standard_normal(4), jnp.float32), batch.weights)
    played = Played(*batch, logps, entropy, logps + apart, ppo.state_values(value, params, batch), scores)
    loss = ppo.ppo(policy, value)

    optimizer = optax.sgd(rate)
    update = over_minibatches(make_step(loss, optimizer, seed=seed), seed=seed, epochs=2, minibatches=2)
    nothing = jax.tree.map(lambda _: None, params)
    state, told = jax.jit(iteration(update, c))(init_state(params, optimizer, kept=jnp.float32(0.05)), nothing, played)

    learnt, _ = ppo.experience(played, 0.05, lam=c.lam)
    slope = jax.jit(jax.grad(lambda params, part: (lambda total, n, _: total / n)(*loss(params, part))))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 4)
    for epoch in jax.random.split(key, 2):
        order = jax.random.permutation(epoch, 4)
        for rows in (order[:2], order[2:]):
            part = jax.tree.map(lambda x, rows=rows: x[rows], learnt)
            params = jax.tree.map(lambda p, g: p - rate * g, params, slope(params, part))
    tiny.assert_trees_close(state.trainable, params, rtol=1e-4)
    kl = float((mask * -apart).sum() / 4)
    assert told["kl"] == pytest.approx(kl, rel=1e-3)
    assert float(state.kept) == pytest.approx(0.05 * (1 + np.clip(kl / 0.01 - 1, -0.2, 0.2) * 4 / 20), rel=1e-5)
    assert (int(state.step), float(told["kl_coef"])) == (1, pytest.approx(0.05))


@pytest.mark.parametrize("judged_by, method", [("adapter", "lora"), ("whole", "lora"), ("adapter", "full")])
def test_four_models_take_the_memory_of_one_base(judged_by, method, world, judges, tmp_path):
    job = Job(world(**{"method": method} | ({"lora.rank": 16} if method == "full" else {})), tmp_path / "run")
    base = buffers((job.trainable, job.frozen) if method == "full" else without(tree.join(job.trainable, job.frozen)))
    refer = reference(job)
    judge = Judge(str(judges[judged_by]))
    judge.sits(job)
    add_value(job, judge)
    params = tree.join(job.trainable, job.frozen)
    shares = {
        "value": params["value"],
        "reward": judge.params,
        "reference": refer({k: params[k] for k in params if k != "value"}),
    }
    shared = {name: len(buffers(part).keys() & base.keys()) for name, part in shares.items()}
    body = len(
        [path for path in tree.flatten(without(judge.params) if judged_by == "adapter" else judge.params) if "score" not in path]
    )
    if method == "full":
        assert shared == {"value": 0, "reward": 0, "reference": 0}  # the base itself trains
    elif judged_by == "adapter":
        assert shared == {"value": body, "reward": body, "reference": len(base)}
        everything = buffers((params, judge.params))
        assert sum(everything.values()) < sum(base.values()) + sum(x.nbytes for x in jax.tree.leaves(job.trainable)) * 2.5
    else:  # the value goes on from the reward model, and shares with that
        assert shared == {"value": 0, "reward": 0, "reference": len(base)}
        assert len(buffers(params["value"]).keys() & buffers(judge.params).keys()) == body
    trained = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(job.trainable)}
    assert not trained & {*buffers(job.frozen), *buffers(judge.params)}  # which a step uses up


def test_a_judge_says_what_the_reward_model_says_and_compiles_once(world, judges, tmp_path):
    job = Job(world(), tmp_path / "run")
    judge = Judge(str(judges["adapter"]))
    judge.sits(job)
    examples = [job.splits.train.example(i) for i in range(7)]
    asked = [example.messages[:1] for example in examples]
    said = ["green", "I cannot say, no", "", "x", "no", "white", "who"]
    questions = [question(job.chat, example) for example in examples]
    ends = list(job.chat.stop_ids[:1])
    answers = [
        Answered(q, {}, [*job.chat.tokenise(text)[0], *(ends if i % 2 else [])], bool(i % 2), text, text)
        for i, (q, text) in enumerate(zip(questions, said))
    ]
    model = sftjax.load(judges["whole"])
    expected = sftjax.rewards(model, [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, said)])
    with jax.set_mesh(job.mesh):
        np.testing.assert_allclose(judge(answers), expected, atol=1e-4)
        judge(answers[:1])
    assert judge.score._cache_size() == 1


def test_a_reward_model_apart_reads_raw_text_behind_its_prompt(world, judges, tmp_path):
    """As it was trained on rows of raw text: the prompt, the answer, and the token that ends a text."""
    model = sftjax.load(judges["whole"])
    end = model.tokenizer.eos_token_id
    rows = [("grass is ", "green"), ("snow is ", "green")]
    answers = [Answered(Question([1], prompt, None), {}, [1], True, said, said) for prompt, said in rows]
    ids = [[*model.tokenizer(prompt + said)["input_ids"], end] for prompt, said in rows]
    judge = Apart(str(judges["whole"]))
    judge.sits(Job(world(), tmp_path / "run"))
    first, second = judge(answers)
    np.testing.assert_allclose([first, second], score(model, ids)[:, 0], atol=1e-4)
    assert first != second


def test_an_adapter_that_names_no_base_is_told_of(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        base_of(tmp_path)


def test_it_learns_and_tells_what_it_did(run, toy):
    workdir, summary = run
    trained = [line for line in lines(workdir) if line["kind"] == "train"]
    shown = {"reward", "kl", "kl_coef", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl", "explained_variance"}
    assert all({*line} >= shown | {"value_loss", "policy_loss", "length", "stopped", "return"} for line in trained)
    assert len({line["kl_coef"] for line in trained}) == STEPS and trained[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert trained[-1]["kl"] != 0 and trained[0]["clip_fraction"] < 0.5
    assert {*summary["seconds_a_step"]} == {"rollout", "score", "learn"}
    assert {"reward_before", "reward", "test_reward"} <= {*summary}
    report = (workdir / "report.html").read_text()
    curves = (
        "Reward of an answer",
        "KL from the reference, nats an answer",
        "Entropy of a token, nats",
        "Share of clipped actions",
    )
    curves += ("variance that the value explains", "Tokens of an answer", "Coefficient of the KL penalty")
    assert all(f"{curve}</h3>" in report for curve in curves)


def test_a_killed_run_ends_as_an_uninterrupted_one(run, world, tmp_path):
    workdir, summary = run
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(world(), again)
    assert (resumed["reward"], resumed["kl"]) == (summary["reward"], summary["kl"])
    assert lines(again) == lines(workdir)
    for place in (workdir, again):
        export(place, to="peft", out=tmp_path / f"of_{place.name}")
    one, other = (tmp_path / f"of_{place.name}" / "adapter_model.safetensors" for place in (workdir, again))
    assert one.read_bytes() == other.read_bytes()


def test_the_policy_alone_is_evaluated(run, tmp_path):
    found = evaluate(run[0], out=tmp_path / "out")
    assert found["of"]["step"] == STEPS and found["models"] == ["base", "tuned"] and found["answered"] == found["rows"] > 0
    assert {"exact_match", "stop_rate"} <= found["figures"][0]["figures"].keys()


def test_the_policy_alone_is_exported(run, toy, tmp_path):
    workdir, _ = run
    export(workdir, to="hf", out=tmp_path / "out")
    policy, base = sftjax.load(tmp_path / "out"), sftjax.load(toy.base)
    assert {*tree.flatten(policy.params)} == {*tree.flatten(base.params)} and not policy.config.labels
    assert policy.logits("what colour is coal?").shape[-1] == base.config.vocab


def test_where_everything_trains_functions_may_judge(world, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loud(completions):\n    return [sum(map(str.isupper, text)) / 8 for text in completions]\n"
    )
    settings = {"method": "full", "lora.rank": 16, "ppo.rewards": (f"{tmp_path}/mine.py:loud", "length:8")}
    settings |= {"ppo.reward_weights": (4.0, 0.5), "ppo.missing_eos_penalty": 0.1, "ppo.score_clip": 5.0}
    settings |= {"ppo.kl_target": None, "ppo.kl_horizon": 10_000.0, "ppo.num_mini_batches": 1, "ppo.kl_coef": 0.0}
    settings |= {"train.steps": 8, "train.batch_size": 16, "optim.lr": 3e-3, "train.save_every": 0}
    summary = tasks.train(world(**settings), tmp_path / "run")
    assert summary["reward"] > summary["reward_before"] + 0.1
    assert {"rewards/loud", "rewards/length", "rewards/loud_before"} <= {*summary}


MISTAKES = {
    "ppo.rewards names no reward function": {"ppo.rewards": ()},
    "--config.ppo.value=reward: needs one reward model in ppo.rewards, which has 0": {
        "ppo.rewards": "length:8",
        "ppo.value": "reward",
    },
    "train.batch_size=4 is no multiple of ppo.num_mini_batches=3": {"ppo.num_mini_batches": 3},
    "--config.ppo.kl_horizon=20.0: means nothing with --config.ppo.kl_target=None": {"ppo.kl_target": None},
    "{base}: a reward model has a score head of one number, this has none": {"ppo.rewards": "model:{base}"},
    "--config.ppo.rewards=model:{base}/nothing: {base}/nothing: no such directory": {"ppo.rewards": "model:{base}/nothing"},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(sentence, toy, world, tmp_path):
    changes = {key: x.format(base=toy.base) if isinstance(x, str) else x for key, x in MISTAKES[sentence].items()}
    with pytest.raises(UserError) as refused:
        tasks.train(world(**changes), tmp_path / "run")
    assert str(refused.value).startswith(sentence.format(base=toy.base))


def test_after_a_mistake_the_directory_is_there_for_what_was_meant(toy, world, tmp_path):
    wrong, meant = world(**{"ppo.rewards": f"model:{toy.base}"}), world()
    with pytest.raises(UserError, match="score head"):
        tasks.train(wrong, tmp_path / "run")
    Job(meant, tmp_path / "run").write_what_it_is()
    (tmp_path / "run" / "metrics.jsonl").touch()  # and it began
    with pytest.raises(UserError, match="holds a run of something else"):
        Job(wrong, tmp_path / "run")


def test_a_judge_that_reads_other_tokens_is_refused(world, judges, tmp_path):
    other = shutil.copytree(judges["whole"], tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    first, *_, last = words["model"]["vocab"]
    words["model"]["vocab"] |= {first: words["model"]["vocab"][last], last: words["model"]["vocab"][first]}
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"other: reads other tokens than the policy writes \(2 of 258"):
        tasks.train(world(**{"ppo.rewards": f"model:{other}"}), tmp_path / "run")
