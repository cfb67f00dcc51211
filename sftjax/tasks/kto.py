"""KTO: answers that are known to be good or bad, each by itself. arXiv:2402.01306."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.losses import kto
from sftjax.tasks.dpo import learn
from sftjax.tasks.job import Job
from sftjax.tasks.reference import reference


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    job = Job(config, workdir, force=force)
    return learn(job, kto(job.forward, reference=reference(job), **options(config)))


def options(config: ConfigDict) -> dict[str, Any]:
    """What `losses.kto` is to be told, but for its reference."""
    return {name: config.kto[name] for name in ("loss", "beta", "desirable_weight", "undesirable_weight")}
