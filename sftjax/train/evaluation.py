"""Held-out rows: what a loss says of them as a whole, how that is logged, and how it is told in a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from sftjax import hosts, tree
from sftjax.data.batch import Batch
from sftjax.losses.tokens import Loss
from sftjax.train.progress import Progress
from sftjax.train.run import Run

AHEAD = 16  # batches on their way


def evaluator(loss: Loss, frozen: Any, mesh: Mesh) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """`(trainable, batches) -> {"loss", "count", ...}`: sums over all batches, divided once; {} where nothing counts.

    Beside them the loss's own metrics, and of `nll` the perplexity.
    """
    sums = jax.jit(lambda trainable, frozen, batch: loss(tree.join(trainable, frozen), batch, None))

    def evaluate(trainable: Any, batches: Iterable[Batch]) -> dict[str, float]:
        parts: list[Any] = []
        for batch in batches:
            parts.append(sums(trainable, frozen, hosts.to_devices(batch, mesh)))
            if len(parts) > AHEAD:  # or a device would be sent all of them at once
                jax.block_until_ready(parts[-AHEAD])
        got = hosts.fetch(parts)
        count = sum(float(n) for _, n, _ in got)
        if not count:
            return {}
        means = {name: sum(float(m[name]) for *_, m in got) / count for name in got[0][2]}
        if "nll" in means:
            means["ppl"] = math.exp(min(means.pop("nll"), 700))
        return {"loss": sum(float(total) for total, *_ in got) / count, "count": count, **means}

    return evaluate


def report(run: Run, progress: Progress, step: int, evaluation: dict[str, float] | None) -> None:
    if evaluation:
        run.log(step, evaluation, kind="eval")
        progress.say(f"{f'step {step}' if step else 'before training'}: eval {told(evaluation)}")


def told(evaluation: dict[str, float]) -> str:
    """loss 1.2345, perplexity 3.44, 40,321 tokens; loss 0.6931, margin 0.000, accuracy 50.0 %, 400 pairs (of KTO: answers);
    or of a classifier's head loss 0.3010, accuracy 90.0 %, 200 rows;
    or of a policy reward 0.812, length_reward 0.500, 12.3 tokens an answer, 98.0 % stopped, 100 answers"""
    e = evaluation
    if "reward" in e:
        functions = [f"{name.removeprefix('rewards/')} {x:.3f}" for name, x in e.items() if name.startswith("rewards/")]
        each = functions if len(functions) > 1 else []
        words = [f"reward {e['reward']:.3f}", *each, f"{e['length']:.1f} tokens an answer", f"{100 * e['stopped']:.1f} % stopped"]
        return ", ".join([*words, f"{e['count']:,.0f} answers"])
    loss, count = f"loss {e['loss']:.4f}", f"{e['count']:,.0f}"
    if "ppl" in e:
        return f"{loss}, perplexity {e['ppl']:.2f}, {count} tokens"
    if "accuracy" in e:
        return f"{loss}, accuracy {100 * e['accuracy']:.1f} %, {count} rows"
    margin = f"margin {e['rewards/margins']:.3f}"
    if "rewards/accuracies" in e:
        return f"{loss}, {margin}, accuracy {100 * e['rewards/accuracies']:.1f} %, {count} pairs"
    return f"{loss}, {margin}, {count} answers"
