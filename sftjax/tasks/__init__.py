"""Tasks: data + loss + loop, a file each. `train(config, workdir)` runs the one that config.task names, or resumes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax import hosts
from sftjax.check import check
from sftjax.join import join
from sftjax.tasks import classify, dpo, grpo, kto, ppo, pretrain, reward, sft
from sftjax.train.run import unlock
from sftjax.train.stop import Stopped

TASKS = {
    "sft": sft.train,
    "classify": classify.train,
    "pretrain": pretrain.train,
    "reward": reward.train,
    "dpo": dpo.train,
    "kto": kto.train,
    "grpo": grpo.train,
    "ppo": ppo.train,
}


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Trains in `workdir` and returns what its summary.json holds. Raises UserError; Stopped where a signal asked for it.

    Where a launcher started several processes (sftjax/join.py), each calls this, and returns the same.
    """
    check(config)
    join()
    with hosts.together(fine=Stopped):
        try:
            return TASKS[config.task](config, workdir, force=force)
        finally:
            unlock(workdir)
