"""sftjax eval of a model with a score head: a file of preferences by their rewards, a file of labelled texts by their labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected, fail_on, read_examples
from sftjax.data.pairs import better
from sftjax.evaluate import classes
from sftjax.evaluate.calibration import calibration
from sftjax.evaluate.sequences import classify, refuse_no_reward, score
from sftjax.hf.model import Model

Say = Callable[[str], None]


def score_file(
    model: Model, data: str, config: ConfigDict, *, out: str | Path | None = None, batch_size: int = 16, say: Say = print
) -> dict[str, Any]:
    """What the head makes of every row of `data`, read as `config.data` has it.

    A reward model      {"pairs", "accuracy", "margin", "ece", "bins"} over all pairs that the file's pairs or rankings make
    a classifier        {"accuracy", "macro_f1", "majority", "per_class", "confusion"}

    `out` is a directory for scores.jsonl, a line a row in the file's order, and eval.json. Raises UserError.
    """
    of_labels = len(model.config.labels) > 1
    if not of_labels:
        refuse_no_reward(model)
    rows = list(read_examples((data,), config.data, want="classes" if of_labels else "rankings"))
    fail_on([row for row in rows if isinstance(row, Rejected)])
    examples = [row for row in rows if isinstance(row, Example)]
    found, lines = (labelled if of_labels else ranked)(model, examples, batch_size)
    if out:
        place = Path(out).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        (place / "scores.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        (place / "eval.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if of_labels:
        say(
            f"{len(examples):,} texts: accuracy {100 * found['accuracy']:.1f} % (the commonest label: "
            f"{100 * found['majority']:.1f} %), macro-F1 {found['macro_f1']:.3f}"
        )
    else:
        say(
            f"{found['pairs']:,} pairs of {len(examples):,} rows: accuracy {100 * found['accuracy']:.1f} %, "
            f"margin {found['margin']:.3f}, expected calibration error {found['ece']:.3f}"
        )
    return found


def ranked(model: Model, examples: list[Example], batch_size: int) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    chat = Chat(model.tokenizer)
    sequences, bounds = [], [0]
    for example in examples:
        try:
            sequences += [chat.encode(alone).ids.tolist() for alone in example.alone()]
        except RowError as e:
            raise UserError(str(Rejected(example.source, example.line, e.field, e.reason))) from e
        bounds.append(len(sequences))
    rewards = score(model, sequences, batch_size=batch_size)[:, 0]
    of = [rewards[a:b] for a, b in pairwise(bounds)]
    answers = [example.answers or () for example in examples]
    ahead = [r[i] - r[j] for r, a in zip(of, answers) for i, j in combinations(range(len(a)), 2) if better(a[i], a[j])]
    if not ahead:
        raise UserError("no row has an answer that is better than another, so there is nothing to compare")
    gaps = np.array(ahead, np.float32)
    found = {"accuracy": float((1 + np.sign(gaps)).mean() / 2), "margin": float(gaps.mean())} | calibration(gaps)
    lines = (
        {"source": f"{e.source}:{e.line}", "rewards": r.tolist(), "ranks": [answer.rank for answer in a]}
        for e, r, a in zip(examples, of, answers)
    )
    return found, lines


def labelled(model: Model, examples: list[Example], batch_size: int) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    known = model.config.labels
    for example in examples:
        if example.label not in known:
            raise UserError(f"{example.source}:{example.line}: {example.label!r} is none of the labels {', '.join(known[:20])}")
    texts = ["\n\n".join(m.content for m in (example.messages or ())[:-1]) for example in examples]
    said, probabilities = classify(model, texts, batch_size=batch_size)
    counts = np.zeros((len(known), len(known)), np.int64)
    for example, label in zip(examples, said):
        counts[known.index(example.label or ""), known.index(label)] += 1
    lines = (
        {"source": f"{e.source}:{e.line}", "label": e.label, "said": label, "probabilities": p.tolist()}
        for e, label, p in zip(examples, said, probabilities)
    )
    return classes.scores(counts, known), lines
