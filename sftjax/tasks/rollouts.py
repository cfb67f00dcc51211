"""Rollouts: the policy answers a step's prompts, and the answers become rows of one fixed length.

    rows of prompts -> Engine, over the policy's own arrays -> Answered -> Batch [N, T], weights 1 where the policy chose

What is random comes from (seed, step, row), so a run that was killed answers again as it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax import hosts, tree
from sftjax.data.batch import Batch
from sftjax.data.pack import assemble, permutation
from sftjax.data.rows import Rows
from sftjax.evaluate.heldout import question
from sftjax.generate.engine import Engine
from sftjax.generate.shapes import between
from sftjax.losses.policy import tempered
from sftjax.losses.tokens import Forward
from sftjax.tasks.job import Job, eval_rows
from sftjax.tasks.rewards import Answered
from sftjax.train.meter import Tally
from sftjax.weights.select import uncut

SHOWN = 100  # held-out answers kept for the report
FILE = "answers_before.json"
RECENT = 10  # steps at the end, over which the distance from the reference is told
BESIDE = ("reference", "reward", "value")  # models that may stand beside the policy's own parts


class Actor:
    """The policy at work: `sample` answers a step's prompts, `batch` lays them out, `evaluate` answers the held-out ones.

    `c` is the task's own group of the config: max_completion_length, temperature and top_p are read from it.
    """

    def __init__(self, job: Job, c: Any, rewards: Callable[[Sequence[Answered]], tuple[np.ndarray, dict[str, np.ndarray]]]):
        self.job, self.rewards, self.seed = job, rewards, job.config.seed
        self.longest, self.sampling = c.max_completion_length, {"temperature": c.temperature, "top_p": c.top_p}
        self.length = row_length(job.config, job.splits.train, self.longest)
        self.forward: Forward = tempered(job.forward, c.temperature)
        self.now: list[dict[str, Any]] = []  # what the last evaluation saw
        place = job.run.checkpoints
        self.begins = not (place.is_dir() and any(place.iterdir()))

    def sample(self, params: Any, rows: Rows, numbers: Sequence[int], step: int, samples: int = 1) -> list[Answered]:
        """`samples` answers to each of the rows of these numbers, those of one prompt side by side."""
        raw = np.random.SeedSequence([self.seed, step]).generate_state(1)[0]
        return self.answers(params, rows, np.repeat(numbers, samples).tolist(), seed=int(raw), **self.sampling)

    def answers(self, params: Any, rows: Rows, numbers: Sequence[int], **options: Any) -> list[Answered]:
        job = self.job
        asked = {i: rows.example(i) for i in dict.fromkeys(numbers)}
        questions = {i: question(job.chat, example) for i, example in asked.items()}
        policy = uncut({name: part for name, part in params.items() if name not in BESIDE}, job.decoder.dtype)
        with jax.set_mesh(job.mesh):
            engine = Engine(dataclasses.replace(job.decoder, lower=0), policy, stop_ids=job.stop_ids, share=True)
            made = engine.generate(
                [questions[i].ids for i in numbers],
                max_new_tokens=self.longest,
                tokenizer=job.chat.tokenizer,
                batch_size=max(eval_rows(job.config), job.config.train.batch_size),
                **options,
            )
        ends = [[] if g.stop_id is None else [g.stop_id] for g in made]
        return [
            Answered(questions[i], asked[i].columns or {}, [*g.ids, *end], g.stopped, g.text, job.chat.said(g.text, g.ids))
            for i, g, end in zip(numbers, made, ends)
        ]

    def batch(self, answers: Sequence[Answered]) -> Batch:
        """numpy, [N, T]: each prompt with its answer, whose tokens have weight 1."""
        rows = []
        for a in answers:
            ids = np.array([*a.question.ids, *a.ids], np.int32)
            weights = np.zeros(len(ids), np.float32)
            weights[len(a.question.ids) :] = 1
            rows.append([(ids, weights, 1)])
        return assemble(rows, self.length)

    def evaluate(self, trainable: Any, part: str) -> dict[str, float]:
        """Held-out prompts answered greedily: {"reward", "rewards/NAME", "length", "stopped", "count"}, means over answers."""
        return self.look(tree.join(trainable, self.job.frozen), part)

    def look(self, params: Any, part: str) -> dict[str, float]:
        rows: Rows = getattr(self.job.splits, part)
        if not len(rows):
            return {}
        answers = self.answers(params, rows, permutation(len(rows), self.seed).tolist())
        earned, each = self.rewards(answers)
        if part == "eval":
            self.now = [
                {"prompt": a.question.prompt, "expected": a.question.expected or ""}
                | {"text": a.said, "stopped": a.stopped, "reward": float(x)}
                for a, x in zip(answers[:SHOWN], earned)
            ]
            if self.begins:
                self.job.run.write_json(FILE, self.now)
                self.begins = False
        return {"reward": float(earned.mean()), **named(each), **figures(answers), "count": float(len(answers))}

    def samples(self, params: Any) -> list[dict[str, Any]]:
        """Rows of samples.jsonl: held-out prompts, as they were answered before training and at the last evaluation."""
        if not self.now:  # a run that was resumed at its end
            self.look(params, "eval")
        before = self.job.run.read_json(FILE) or []
        return [
            {
                "prompt": b["prompt"],
                "expected": b["expected"],
                "base": b["text"],
                "tuned": a["text"],
                "base_stopped": b["stopped"],
                "tuned_stopped": a["stopped"],
                "reward_base": b["reward"],
                "reward_tuned": a["reward"],
            }
            for b, a in zip(before, self.now)
        ]


def row_length(config: ConfigDict, prompts: Rows, longest: int) -> int:
    """Of a row that holds the longest prompt and an answer of so many tokens."""
    return min(config.data.max_length, between(int(prompts.lengths.max()) + longest, 32))


def named(each: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each reward function over the answers that it has a reward for."""
    return {f"rewards/{name}": float(np.nanmean(x)) for name, x in each.items() if not np.isnan(x).all()}


def figures(answers: Sequence[Answered]) -> dict[str, float]:
    return {
        "length": float(np.mean([len(a.ids) for a in answers])),
        "stopped": float(np.mean([a.stopped for a in answers])),
    }


def in_parts(job: Job, look: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """`look`, arrays [n, T] of the params and n rows, as a function of any number N of rows, train.micro_batch at a time:
    numpy, [N, T]. It is compiled once."""
    rows, run = job.config.train.micro_batch or job.config.train.batch_size, jax.jit(look)

    def whole(params: Any, batch: Batch) -> Any:
        parts = [jax.tree.map(lambda x, at=at: x[at : at + rows], batch) for at in range(0, len(batch.tokens), rows)]
        found = [hosts.fetch(run(params, hosts.to_devices(hosts.own(part, job.mesh), job.mesh))) for part in parts]
        return jax.tree.map(lambda *each: np.concatenate(each), *found)

    return whole


def summary(job: Job, tally: Tally) -> dict[str, Any]:
    """For summary.json: held-out rewards before and after, the distance from the reference at the end, and the median
    seconds of a step by stage, which it says too."""
    lines = [line for line in job.run.read_metrics() if line["kind"] == "train"]
    names = [name for name in lines[-1] if name.startswith("seconds/")] if lines else []
    seconds = {name.removeprefix("seconds/"): float(np.median([line[name] for line in lines])) for name in names}
    if seconds:
        job.say("a step: " + ", ".join(f"{name} {x:.2f} s" for name, x in seconds.items()) + " (medians)")
    kl = [line["kl"] for line in lines[-RECENT:] if line.get("kl") is not None]
    return tally.rewards() | ({"kl": float(np.mean(kl))} if kl else {}) | {"seconds_a_step": seconds}
