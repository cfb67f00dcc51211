"""sftjax eval of a run of preferences: its loss and rewards on every held-out pair, or answer, and how likely those are.

The reference is the model before training, so that as in training its own rewards are 0, its accuracy a half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import hosts
from sftjax.data.batch import Referred
from sftjax.data.rows import Rows
from sftjax.data.stream import eval_batches
from sftjax.evaluate.metrics import Sums, mean, ratio
from sftjax.losses import token_logps
from sftjax.losses.dpo import each_answer, each_pair
from sftjax.losses.tokens import Forward
from sftjax.tasks import dpo, kto
from sftjax.tasks.job import eval_rows

TASKS = ("dpo", "kto")
Found = dict[str, np.ndarray]  # of each row


def figures(forward: Forward, sides: Sequence[Any], rows: Rows, config: ConfigDict, mesh: Mesh) -> dict[str, list[Sums]]:
    """Every figure of each of `sides`, parameters of which the first are the reference: Sums over `rows`."""
    each = [by_row(forward, params, sides[0], rows, config, mesh) for params in sides]
    of = of_pairs if config.task == "dpo" else of_answers
    found = [of(one) for one in each]
    return {name: [one[name] for one in found] for name in found[0]}


def by_row(forward: Forward, params: Any, reference: Any, rows: Rows, config: ConfigDict, mesh: Mesh) -> Found:
    """The loss of every row, in the batches that training evaluates on, and what it is made of."""
    referred = config.task == "kto" or dpo.refers(config)
    build: Callable[..., Any] = each_pair if config.task == "dpo" else each_answer
    options = dpo.options(config) if config.task == "dpo" else kto.options(config)
    each = build(forward, reference="batch" if referred else None, **options)
    logps = token_logps(forward)

    @jax.jit
    def run(params: Any, reference: Any, batch: Any) -> dict[str, Array]:
        losses, _, found = each(params, Referred(**batch._asdict(), reference=logps(reference, batch)) if referred else batch)
        return {"loss": losses} | {name: x for name, x in found.items() if x.ndim}

    bins = rows.plan(seed=0, epoch=0, max_length=config.data.max_length, packing=True)
    out: Found = {}
    at, size = 0, eval_rows(config)
    for batch in eval_batches(rows, size, config.data.max_length):
        found = jax.device_get(run(params, reference, hosts.to_devices(batch, mesh)))
        for b, bin in enumerate(range(at, min(at + size, len(bins)))):
            for n, (row, _, _) in enumerate(bins[bin]):
                for name, values in found.items():
                    out.setdefault(name, np.zeros(len(rows)))[row] = values[b, n]
        at += size
    return out


def of_pairs(found: Found) -> dict[str, Sums]:
    return {
        "loss": mean(found["loss"]),
        "preference_accuracy": mean(found["rewards/accuracies"]),
        "margin": mean(found["rewards/margins"]),
        "logps_chosen": mean(found["logps/chosen"]),
        "logps_rejected": mean(found["logps/rejected"]),
    }


def of_answers(found: Found) -> dict[str, Sums]:
    good = found["desirable"] > 0

    def apart(x: np.ndarray) -> np.ndarray:
        """The mean over good answers less that over bad ones; nan where there are only the ones."""
        means = [np.divide(x[..., i], x[..., i + 1], out=np.full(x.shape[:-1], np.nan), where=x[..., i + 1] > 0) for i in (0, 2)]
        return means[0] - means[1]

    sides = np.stack([good * found["rewards"], good, ~good * found["rewards"], ~good], axis=1).astype(float)
    return {
        "loss": mean(found["loss"]),
        "margin": Sums(sides, apart),
        "logps_chosen": ratio(good * found["logps"], good),
        "logps_rejected": ratio(~good * found["logps"], ~good),
    }
