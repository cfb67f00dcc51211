"""Supervised fine-tuning: masked cross entropy on the answers, with NEFTune where it is asked for.

Held-out prompts are answered before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.losses import Loss, masked_xent, neftune
from sftjax.losses.tokens import Forward
from sftjax.tasks.answers import Answers
from sftjax.tasks.job import Job


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    return learn(Job(config, workdir, force=force))


def learn(job: Job, summary: Callable[[Answers], dict[str, Any]] = Answers.summary) -> dict[str, Any]:
    """The job with these losses; `summary` is what summary.json holds of the answers."""
    answers = Answers(job)
    answers.before()
    params, tally = job.fit(
        loss=loss_of(job.config.loss, job.forward),
        eval_loss=masked_xent(job.forward),
        answer=answers.now,
    )
    answers.after(params)
    return job.finish(tally, summary(answers), answers.samples())


def loss_of(c: ConfigDict, forward: Forward) -> Loss:
    """By config.loss."""
    noisy = neftune(forward, alpha=c.neftune_alpha) if c.neftune_alpha else forward
    return masked_xent(noisy, label_smoothing=c.label_smoothing, z_loss=c.z_loss, router_balance=c.router_balance)
