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

from sftjax.data.rows import Rows
from sftjax.losses import Loss
from sftjax.losses.reward import listwise, pair_differences, pairwise
from sftjax.tasks.job import Job
from sftjax.train.loop import to_devices

BINS = 10  # of confidence, from 0.5 to 1


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    job = Job(config, workdir, force=force)
    c, answers = config.reward, job.splits.train.slots // 2
    loss: Loss
    if c.loss == "plackett_luce":
        loss = listwise(job.forward, answers=answers, centring=c.centring)
    else:
        loss = pairwise(job.forward, margin=c.margin, centring=c.centring)
    params, tally = job.fit(loss=loss, eval_loss=loss)
    found = calibration(differences(job, params, job.splits.eval, answers if c.loss == "plackett_luce" else 0))
    if found:
        job.say(f"held out: expected calibration error {found['ece']:.3f} over {found['pairs']:,} pairs")
    extra = tally.preferences() | ({"calibration": found} if found else {})
    return job.finish(tally, extra=extra, samples=[])


def differences(job: Job, params: Any, rows: Rows, answers: int) -> np.ndarray:
    """Reward of the better answer less that of the worse one, of each pair of the rows; of rankings of up to `answers`."""
    each = jax.jit(pair_differences(job.forward, answers))
    with jax.set_mesh(job.mesh):
        found = [jax.device_get(each(params, to_devices(batch, job.mesh))) for batch in job.held_out(rows)]
    return np.concatenate([ahead[real] for ahead, real in found]) if found else np.zeros(0, np.float32)


def calibration(ahead: np.ndarray) -> dict[str, Any]:
    """Is the model right as often as it is sure? {"ece", "pairs", "bins": [{"from", "to", "pairs", "confidence", "accuracy"}]}.

    Of a pair it is sure of one answer by sigmoid(|r_1 - r_2|), 0.5 to 1; the expected calibration error is the mean over pairs
    of |share that is right - mean confidence| of their bin, arXiv:1706.04599, eq. 3. {} without pairs.
    """
    if not len(ahead):
        return {}
    confidence = 1 / (1 + np.exp(-np.abs(ahead.astype(np.float64))))
    right = (1 + np.sign(ahead)) / 2
    edges = np.linspace(0.5, 1, BINS + 1)
    which = np.clip(np.digitize(confidence, edges) - 1, 0, BINS - 1)
    bins, off = [], 0.0
    for b in range(BINS):
        here = which == b
        if n := int(here.sum()):
            sure, so = float(confidence[here].mean()), float(right[here].mean())
            bins.append({"from": edges[b], "to": edges[b + 1], "pairs": n, "confidence": sure, "accuracy": so})
            off += n * abs(sure - so)
    return {"ece": off / len(ahead), "pairs": len(ahead), "bins": bins}
