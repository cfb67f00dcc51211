"""sftjax eval of a model with a score head: a file of preferences by their rewards, a file of labelled texts by their labels.

Every figure has its interval, and is told by tag. What is drawn again are rows: the pairs of one ranking share their answers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected, fail_on, read_examples
from sftjax.data.pairs import better
from sftjax.evaluate import classes
from sftjax.evaluate.bootstrap import DRAWS, SHARE
from sftjax.evaluate.calibration import calibration, calibration_sums
from sftjax.evaluate.figures import Part, by_tag
from sftjax.evaluate.metrics import Sums, label_sums, mean, ratio
from sftjax.evaluate.sequences import classify, refuse_no_reward, score
from sftjax.hf.load import load_config, resolve
from sftjax.hf.model import Model
from sftjax.hf.peft import adapter_labels
from sftjax.train.run import Run

KEYS = (  # of the config, that say something of such an evaluation
    *("data.format", "data.columns", "data.roles", "data.system", "data.label_prompt", "data.template", "data.on_bad_row"),
    *("seed", "model.dtype", "model.trust_remote_code"),
)
Say = Callable[[str], None]
Found = tuple[dict[str, Any], dict[str, Sums], list[dict[str, Any]]]  # figures of all rows, Sums by row, a line a row


def head(model: str, adapter: str | None = None) -> tuple[str, ...]:
    """What the numbers of the score head mean that a checkpoint, or an adapter over it, ends with; () where there is none."""
    own = load_config(resolve(model)).labels
    return own or (tuple(adapter_labels(resolve(adapter, needs="adapter_config.json"))) if adapter else ())


def score_file(
    model: Model, data: str, config: ConfigDict, *, place: Run | None = None, batch_size: int = 16, say: Say = print
) -> dict[str, Any]:
    """What the head makes of every row of `data`, read as `config.data` has it.

    A reward model      {"pairs", "accuracy", "margin", "ece", "bins"} over all pairs that the file's pairs or rankings make
    a classifier        {"accuracy", "macro_f1", "majority", "per_class", "confusion"}
    both                {"figures": as `figures.by_tag` has them, "intervals", ...}

    Into `place` go scores.jsonl, a line a row in the file's order, and eval.json. Raises UserError.
    """
    of_labels = len(model.config.labels) > 1
    if not of_labels:
        refuse_no_reward(model.directory, model.config.labels)
    rows = list(read_examples((data,), config.data, want="classes" if of_labels else "rankings"))
    examples, bad = [row for row in rows if isinstance(row, Example)], [row for row in rows if isinstance(row, Rejected)]
    if config.data.on_bad_row == "error":
        fail_on(bad)
    elif bad:
        say(f"{len(bad):,} rows cannot be used and are left out, the first: {bad[0]}")
    if not examples:
        raise UserError(f"--data={data}: has no row that can be used")
    if of_labels and config.data.template:
        raise UserError(f"--config.data.template={config.data.template}: a classifier reads its texts without one; leave it out")
    found, sums, lines = (
        labelled(model, examples, batch_size) if of_labels else ranked(model, examples, batch_size, config.data.template)
    )
    found |= {
        "of": {"model": str(model.directory), "data": data},
        "rows": len(examples),
        "models": ["model"],
        "metrics": [next(iter(sums))],
        "how": {},
        "intervals": {"per_cent": SHARE, "draws": DRAWS, "seed": config.seed},
        "figures": by_tag(
            [Part([e.tags for e in examples], {name: [of] for name, of in sums.items()})], ["model"], seed=config.seed
        ),
    }
    if place is not None:
        place.write_lines("scores.jsonl", lines)
        place.write_json("eval.json", found)
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


def ranked(model: Model, examples: list[Example], batch_size: int, template: str | None) -> Found:
    chat = Chat(model.tokenizer, template=template)
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
    ahead = [[r[i] - r[j] for i, j in combinations(range(len(a)), 2) if better(a[i], a[j])] for r, a in zip(of, answers)]
    gaps = np.array([gap for row in ahead for gap in row], np.float32)
    if not len(gaps):
        raise UserError("no row has an answer that is better than another, so there is nothing to compare")
    pairs = [len(row) for row in ahead]
    sums = {
        "accuracy": ratio([float((1 + np.sign(row)).sum() / 2) for row in ahead], pairs),
        "margin": ratio([float(np.sum(row)) for row in ahead], pairs),
        "ece": calibration_sums(ahead),
    }
    found = {"accuracy": float((1 + np.sign(gaps)).mean() / 2), "margin": float(gaps.mean())} | calibration(gaps)
    lines = [
        {"source": f"{e.source}:{e.line}", "rewards": r.tolist(), "ranks": [answer.rank for answer in a]}
        for e, r, a in zip(examples, of, answers)
    ]
    return found, sums, lines


def labelled(model: Model, examples: list[Example], batch_size: int) -> Found:
    known = model.config.labels
    for example in examples:
        if example.label not in known:
            raise UserError(f"{example.source}:{example.line}: {example.label!r} is none of the labels {', '.join(known[:20])}")
    texts = ["\n\n".join(m.content for m in (example.messages or ())[:-1]) for example in examples]
    said, probabilities = classify(model, texts, batch_size=batch_size)
    counts = np.zeros((len(known), len(known)), np.int64)
    for example, label in zip(examples, said):
        counts[known.index(example.label or ""), known.index(label)] += 1
    lines = [
        {"source": f"{e.source}:{e.line}", "label": e.label, "said": label, "probabilities": p.tolist()}
        for e, label, p in zip(examples, said, probabilities)
    ]
    expected = [example.label or "" for example in examples]
    hits = mean([label == wanted for label, wanted in zip(said, expected)])
    return classes.scores(counts, known), {"accuracy": hits, "macro_f1": label_sums(said, expected)}, lines
