"""The same held-out prompts answered by the model before and after training."""

from __future__ import annotations

import dataclasses
from typing import Any

from sftjax import tree
from sftjax.evaluate import heldout
from sftjax.generate.engine import Engine
from sftjax.tasks.job import Job
from sftjax.weights.lora import merge
from sftjax.weights.select import uncut

FILE = "answers_before.json"


class Answers:
    """`config.eval.generate` held-out rows; none where it is 0 or nothing is held out. Those from before survive a resume."""

    def __init__(self, job: Job):
        self.job = job
        rows = job.splits.eval
        self.examples = [rows.example(i) for i in range(min(job.config.eval.generate, len(rows)))]
        self.base: list[heldout.Answer] = []
        self.tuned: list[heldout.Answer] = []

    def before(self) -> None:
        if not self.examples:
            return
        kept = self.job.run.read_json(FILE)
        if kept:
            self.base = [heldout.Answer(**answer) for answer in kept]
            return
        self.base = self.answer(tree.join(self.job.trainable, self.job.frozen))
        self.job.run.write_json(FILE, [dataclasses.asdict(answer) for answer in self.base])
        self.say("before training", self.base)

    def after(self, params: Any) -> None:
        if self.examples:
            self.tuned = self.answer(params)
            self.say("after training", self.tuned)

    def answer(self, params: Any) -> list[heldout.Answer]:
        job = self.job
        decoder = dataclasses.replace(job.decoder, lower=0)
        engine = Engine(decoder, merge(uncut(params)), stop_ids=job.chat.stop_ids)
        return heldout.answers(engine, job.chat, self.examples, max_new_tokens=job.config.eval.max_new_tokens)

    def say(self, when: str, answers: list[heldout.Answer]) -> None:
        exact, stopped = (100 * heldout.summary(answers)[name] for name in ("exact_match", "stop_rate"))
        self.job.say(f"{when}: {exact:.1f} % of {len(answers)} held-out answers exact, {stopped:.1f} % stopped by themselves")

    def summary(self) -> dict[str, Any]:
        if not self.examples:
            return {}
        before, after = heldout.summary(self.base), heldout.summary(self.tuned)
        return {f"{name}_before": value for name, value in before.items()} | after

    def samples(self) -> list[dict[str, Any]]:
        return heldout.samples(self.base, self.tuned) if self.examples else []
