"""A reward model: a score head that says how good an answer is, learnt from which of two answers people chose. arXiv:2203.02155.

    r = h_T @ w of the conversation's last token;   -log sigmoid(r_chosen - r_rejected)

Out comes a ...ForSequenceClassification of one number, as TRL's RewardTrainer makes and reads them. `reward.loss` plackett_luce
learns whole rankings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax import hosts
from sftjax.data.rows import Rows
from sftjax.evaluate.calibration import calibration
from sftjax.losses import Loss
from sftjax.losses.reward import listwise, pair_differences, pairwise
from sftjax.losses.tokens import Forward
from sftjax.tasks.job import Job


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    job = Job(config, workdir, force=force)
    c, answers = config.reward, job.splits.train.slots // 2
    loss = loss_of(c, job.forward, answers)
    params, tally = job.fit(loss=loss, eval_loss=loss)
    found = calibration(differences(job, params, job.splits.eval, answers if c.loss == "plackett_luce" else 0))
    if found:
        job.say(f"held out: expected calibration error {found['ece']:.3f} over {found['pairs']:,} pairs")
    extra = tally.preferences() | ({"calibration": found} if found else {})
    return job.finish(tally, extra=extra, samples=[])


def loss_of(c: ConfigDict, forward: Forward, answers: int) -> Loss:
    """By config.reward; `answers` is how many a ranking has at most."""
    if c.loss == "plackett_luce":
        return listwise(forward, answers=answers, centring=c.centring)
    return pairwise(forward, margin=c.margin, centring=c.centring)


def differences(job: Job, params: Any, rows: Rows, answers: int) -> np.ndarray:
    """Reward of the better answer less that of the worse one, of each pair of the rows; of rankings of up to `answers`."""
    each = jax.jit(pair_differences(job.forward, answers))
    with jax.set_mesh(job.mesh):
        found = [hosts.fetch(each(params, hosts.to_devices(batch, job.mesh))) for batch in job.held_out(rows)]
    return np.concatenate([ahead[real] for ahead, real in found]) if found else np.zeros(0, np.float32)
