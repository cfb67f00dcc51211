"""Continued pretraining: plain text fills every row, every token is trained, documents never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.losses import masked_xent
from sftjax.tasks.job import Job


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    job = Job(config, workdir, force=force)
    c = config.loss
    loss = masked_xent(job.forward, label_smoothing=c.label_smoothing, z_loss=c.z_loss, router_balance=c.router_balance)
    _, tally = job.fit(loss=loss, eval_loss=masked_xent(job.forward))
    return job.finish(tally, extra={}, samples=[])
