"""DPO and its kin: of two answers to a prompt, the one that people chose is to gain on the other. arXiv:2305.18290.

A pair is one row of data (`prompt`, `chosen`, `rejected`) and two segments of one packed row. `dpo.loss` names the loss, from
`losses/preference.py`; orpo, simpo and cpo have no reference. Held-out prompts are answered before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.config import default as default_config
from sftjax.losses import Loss, dpo
from sftjax.losses.preference import WITHOUT_REFERENCE
from sftjax.tasks.answers import Answers
from sftjax.tasks.job import Job
from sftjax.tasks.reference import reference

# keys of config.dpo that are options of a loss, by the same name
OPTIONS = (
    *("label_smoothing", "divergence", "alpha", "ld_alpha", "per_token", "tau", "shift", "gamma"),
    *("nll", "nll_by", "prompt_nll"),
)


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    wanted = options(config)
    job = Job(config, workdir, force=force)
    return learn(job, dpo(job.forward, reference=reference(job) if refers(config) else None, **wanted))


def learn(job: Job, loss: Loss) -> dict[str, Any]:
    """The job with this loss, of pairs or of answers that are good or bad."""
    answers = Answers(job)
    answers.before()
    params, tally = job.fit(loss=loss, eval_loss=loss, answer=answers.now)
    answers.after(params)
    return job.finish(tally, extra=answers.summary() | tally.preferences(), samples=answers.samples())


def losses(config: ConfigDict) -> dict[str, float]:
    """The losses that config.dpo wants, each with its weight."""
    c = config.dpo
    names = {c.loss: 1.0} if isinstance(c.loss, str) else dict(c.loss)
    return names | ({"sft": c.sft_weight} if c.sft_weight else {})


def refers(config: ConfigDict) -> bool:
    """Whether any of them has a reference."""
    return any(name not in WITHOUT_REFERENCE for name in losses(config))


def options(config: ConfigDict) -> dict[str, Any]:
    """What `losses.dpo` is to be told, but for its reference. Raises UserError while nothing has been loaded or written."""
    c, defaults = config.dpo, default_config().dpo
    if c.sft_weight and (c.loss == "sft" or (not isinstance(c.loss, str) and "sft" in c.loss)):
        raise UserError(f"dpo.sft_weight={c.sft_weight}: the loss sft is in dpo.loss already; leave it out")
    changed = {name: c[name] for name in OPTIONS if c[name] != defaults[name]}
    never_run: Any = None
    found: dict[str, Any] = {"loss": losses(config), "beta": c.beta, **changed}
    try:
        dpo(never_run, reference="none" if refers(config) else None, **found)
    except UserError as e:
        raise UserError(f"dpo.{e}") from e
    if c.precompute_ref_log_probs and not refers(config):
        raise UserError(f"dpo.precompute_ref_log_probs: the loss {', '.join(losses(config))} has no reference; leave it out")
    return found
