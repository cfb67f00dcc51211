"""The same held-out prompts answered by the model before and after training."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from typing import Any

import jax

from sftjax import hosts, tree
from sftjax.config import parts
from sftjax.data.pack import permutation
from sftjax.evaluate import heldout
from sftjax.generate.engine import Engine
from sftjax.tasks.job import Job
from sftjax.weights.select import uncut

WATCHED = 4  # prompts that are answered while training goes on
FILE = "answers_before.json"  # {"of": what was asked of what, "answers": [...]}


class Answers:
    """`config.eval.generate` of the held-out rows, chosen by the seed from those that ask something; none where none do.

    The answers from before training survive a resume, unless something else is asked by then or something else would answer.
    """

    def __init__(self, job: Job):
        self.job = job
        rows, wanted = job.splits.eval, job.config.eval.generate
        every = job.config.train.generate_every
        shuffled = (rows.example(i) for i in permutation(len(rows), job.config.seed).tolist())
        watched = WATCHED if every else 0
        found = list(itertools.islice(heldout.questions(job.chat, shuffled), max(wanted, watched)))
        self.questions, self.watched = found[:wanted], found[:watched]
        metrics = parts(job.config.eval.metrics)
        heldout.refuse_missing(metrics)
        self.metrics = metrics or heldout.suited([q.expected or "" for q in found], [q.label for q in found])
        self.base: list[heldout.Answer] = []
        self.tuned: list[heldout.Answer] = []
        why = "no held-out row asks for a text" if len(rows) else "no rows are held out"
        if wanted and not found:
            job.say(f"eval.generate={wanted}: {why}, so nothing is answered before and after training")
        if watched and not found:
            job.say(f"train.generate_every={job.config.train.generate_every}: {why}, so nothing is answered during training")

    def before(self) -> None:
        if not self.questions:
            return
        kept, of = self.job.run.read_json(FILE), self.fingerprint()
        known = isinstance(kept, dict) and kept.get("of") == of
        if not hosts.which(not known):  # all of them see it
            self.base = [heldout.Answer(**answer) for answer in kept["answers"]]
            return
        self.base = self.answer(tree.join(self.job.trainable, self.job.frozen), self.questions)
        self.job.run.write_json(FILE, {"of": of, "answers": [dataclasses.asdict(answer) for answer in self.base]})
        self.say("before training", self.base)

    def after(self, params: Any) -> None:
        if self.questions:
            self.tuned = self.answer(params, self.questions)
            self.say("after training", self.tuned)

    def now(self, params: Any) -> list[dict[str, Any]]:
        """A few of the answers as training goes on, for metrics.jsonl."""
        told = ("prompt", "expected", "text", "stopped", "exact")
        return [{name: getattr(a, name) for name in told} for a in self.answer(params, self.watched)] if self.watched else []

    def answer(self, params: Any, questions: list[heldout.Question]) -> list[heldout.Answer]:
        job = self.job
        with jax.set_mesh(job.mesh):
            whole = uncut(params, job.decoder.dtype)
            engine = Engine(dataclasses.replace(job.decoder, lower=0), whole, stop_ids=job.stop_ids)
            longest = job.config.eval.max_new_tokens
            return heldout.answers(engine, questions, chat=job.chat, max_new_tokens=longest)

    def fingerprint(self) -> str:
        """sha256 of all that decides the answers before training."""
        asked = [(q.ids, q.expected) for q in self.questions]
        hashes = self.job.manifest["hashes"]
        c = self.job.config
        decides = [asked, hashes["base"], hashes["adapter"], self.job.stop_ids, c.eval.max_new_tokens]
        decides += [c.model.quantize, str(self.job.decoder.dtype), self.job.chat.thought.pattern]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def say(self, when: str, answers: list[heldout.Answer]) -> None:
        exact, stopped = (100 * heldout.summary(answers)[name] for name in ("exact_match", "stop_rate"))
        self.job.say(f"{when}: {exact:.1f} % of {len(answers)} held-out answers exact, {stopped:.1f} % stopped by themselves")

    def summary(self) -> dict[str, Any]:
        if not self.questions:
            return {}
        before, after = (heldout.summary(answers, self.metrics) for answers in (self.base, self.tuned))
        return {f"{name}_before": value for name, value in before.items()} | after

    def samples(self) -> list[dict[str, Any]]:
        return heldout.samples(self.base, self.tuned)
