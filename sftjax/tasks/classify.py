"""Classification: rows of text and label. `classify.by` says how: the label is generated, or a linear head scores each label.

label   the label is the answer to data.label_prompt, as any other answer: supervised fine-tuning
head    score = h_T @ W of the text's last token, -log softmax(score)[label]; out comes a ...ForSequenceClassification
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax import hosts, tree
from sftjax.data.formats import LABELS, in_order
from sftjax.data.rows import Rows
from sftjax.evaluate import classes
from sftjax.losses import Loss, neftune
from sftjax.losses.classify import classify as cross_entropy
from sftjax.losses.classify import predicted
from sftjax.losses.tokens import Forward
from sftjax.tasks import sft
from sftjax.tasks.answers import Answers
from sftjax.tasks.job import Job


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    if config.classify.by == "label":
        return by_label(Job(config, workdir, force=force))
    job = Job(config, workdir, force=force)
    labels = job.base.labels
    weights = class_weights(config.classify.class_weights, labels, job.splits.train.labels())
    counts = counted(labels, job.splits.train.labels())
    tell_balance(job, counts, weights)
    if missing := [label for label, n in counts.items() if not n]:
        job.say(f"warning: no training row has the label {', '.join(missing)}: the head cannot learn it")
    elif not weights and max(counts.values()) > 4 * min(counts.values()):
        job.say("the labels are uneven: --config.classify.class_weights=balanced makes the rare ones count more")
    had_head = bool(job.base.source_config.labels or job.base.adapter)
    count = jax.jit(predicted(job.forward))
    before = confusion(job, count, tree.join(job.trainable, job.frozen), job.splits.eval) if had_head else None
    params, tally = job.fit(loss=loss_of(config.loss, job.forward, weights), eval_loss=cross_entropy(job.forward))
    found = classes.scores(confusion(job, count, params, job.splits.eval), labels)
    test = classes.scores(confusion(job, count, params, job.splits.test), labels)
    if found:
        right, majority = 100 * found["accuracy"], 100 * found["majority"]
        job.say(f"held out: accuracy {right:.1f} % (the commonest label: {majority:.1f} %), macro-F1 {found['macro_f1']:.3f}")
    extra: dict[str, Any] = {
        "accuracy_before": (tally.before or {}).get("accuracy"),
        "macro_f1_before": None if before is None else classes.scores(before, labels).get("macro_f1"),
        **{f"test_{name}": test[name] for name in ("accuracy", "macro_f1") if test},
    }
    if found:
        balance = {"labels": list(labels), "counts": counts, "weights": weights}
        extra |= {name: found.pop(name) for name in ("accuracy", "macro_f1")} | {"classes": balance | found}
    return job.finish(tally, extra=extra, samples=[])


def loss_of(c: ConfigDict, forward: Forward, weights: Sequence[float] = ()) -> Loss:
    """A head's, by config.loss."""
    noisy = neftune(forward, alpha=c.neftune_alpha) if c.neftune_alpha else forward
    return cross_entropy(noisy, class_weights=weights, label_smoothing=c.label_smoothing)


def by_label(job: Job) -> dict[str, Any]:
    """Labels as answers: fine-tuning, with what the answers before and after were taken for."""
    rows = job.splits.train
    found = Counter(label for i in range(len(rows)) if (label := rows.example(i).label) is not None)
    if len(found) > LABELS:
        job.say(f"{len(found):,} labels of the training rows, more than {LABELS}: no figures of each")
        return sft.learn(job)
    tell_balance(job, {label: found[label] for label in in_order(found)})

    def summary(answers: Answers) -> dict[str, Any]:
        if not answers.questions:
            return {}
        expected = [q.label or "" for q in answers.questions]
        labels = in_order({*found, *expected})
        before, after = (
            classes.scores(classes.counted(expected, [a.text for a in each], labels), labels)
            for each in (answers.base, answers.tuned)
        )
        told = {"labels": list(labels), "counts": {label: found[label] for label in labels}, "weights": []}
        told |= {name: after[name] for name in ("majority", "per_class", "confusion")}
        told |= {f"{name}_before": before[name] for name in ("per_class", "confusion")}
        return answers.summary() | {"classes": told}

    return sft.learn(job, summary)


def class_weights(asked: Any, labels: Sequence[str], rows: np.ndarray) -> list[float]:
    """What a text of each label counts; [] where all count the same. balanced: N / (C * texts of the label)."""
    if asked == "none":
        return []
    if asked == "balanced":
        counts = np.bincount(rows, minlength=len(labels))
        return (len(rows) / (len(labels) * np.maximum(counts, 1))).tolist()
    return [float(asked.get(label, 1.0)) for label in labels]


def counted(labels: Sequence[str], rows: np.ndarray) -> dict[str, int]:
    return dict(zip(labels, np.bincount(rows, minlength=len(labels)).tolist()))


def tell_balance(job: Job, counts: Mapping[str, int], weights: Sequence[float] = ()) -> None:
    """The labels of the training rows, with what each counts where they do not count alike."""
    total, wide = sum(counts.values()), max(map(len, counts))
    job.say(f"{len(counts)} labels of the training rows:")
    for i, (label, n) in enumerate(counts.items()):
        job.say(f"  {label:<{wide}}  {n:>9,}  {100 * n / total:5.1f} %" + (f"  counts {weights[i]:.3g}" if weights else ""))


def confusion(job: Job, count: Callable[..., Any], params: Any, rows: Rows) -> np.ndarray:
    """[C, C] counts over `rows`, by a compiled `predicted`."""
    C = len(job.base.labels)
    found = np.zeros((C, C), np.int64)
    with jax.set_mesh(job.mesh):
        for batch in job.held_out(rows):
            found += hosts.fetch(count(params, hosts.to_devices(batch, job.mesh)))
    return found
