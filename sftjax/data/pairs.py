"""Which answers of a preference stand side by side in a row: pairs, the whole ranking, or each by itself. And pairs, written.

    B > A > C > D   pairs      (B,A) (B,C) (B,D) (A,C) (A,D) (C,D), in this order
                    rankings   (B,A,C,D)
    B > A           labels     (B) good, (A) bad

Answers that are equal in rank, or say the same, make no pair.

An answer's slot says what it is compared as: 1 the chosen of a pair and 2 the rejected; 1 a good answer and 2 a bad one; of a
ranking the k-th answer, from 0, has slot 2k + 1, or 2k + 2 where it is as good as the one before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

from ml_collections import ConfigDict

from sftjax.config import UserError, default
from sftjax.data.chat import as_dict
from sftjax.data.example import Answer, Example, Message
from sftjax.data.formats import Rejected, fail_on, read_examples
from sftjax.data.lines import new_file, whole

Slots = dict[int, int]  # which answer, by its number -> the segment that it is in the row's group of so many, from 1
# segment numbers of a row; of rankings, two for each answer of the longest
SLOTS = {"answers": 1, "pairs": 2, "labels": 3, "classes": 1, "prompts": 1}


def sides(answers: Sequence[Answer], want: str) -> list[Slots]:
    """The rows that `answers`, best first, make where `want` is "pairs", "rankings" or "labels"; none where all are equal."""
    match want, answers:
        case "labels", [answer]:
            return [{0: answer.rank}]
        case "labels", _:
            return [{k: slot} for side in sides(answers, "pairs") for k, slot in side.items()]
        case "pairs", _:
            return [{i: 1, j: 2} for i, j in combinations(range(len(answers)), 2) if better(answers[i], answers[j])]
        case "rankings", _:
            equal = [k > 0 and answer.rank == answers[k - 1].rank for k, answer in enumerate(answers)]
            return [{k: 2 * k + 1 + e for k, e in enumerate(equal)}] if sides(answers, "pairs") else []
    raise ValueError(f"want={want}: pairs, rankings or labels")


def better(a: Answer, b: Answer) -> bool:
    return a.rank < b.rank and a.said != b.said


def rows(example: Example) -> Iterator[dict[str, Any]]:
    """Every pair as {"prompt", "chosen", "rejected"}: raw text, or lists of turns; with tools and tags where there are any."""
    answers = example.answers or ()
    for side in sides(answers, "pairs"):
        chosen, rejected = (written(answers[k].said) for k in side)
        prompt = written(example.messages or example.text or "")
        more = {"tools": list(example.tools or ()), "tags": list(example.tags)}
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, **{name: held for name, held in more.items() if held}}


def written(said: tuple[Message, ...] | str) -> Any:
    if isinstance(said, str):
        return said
    return [as_dict(m) | ({} if m.loss is None else {"loss": m.loss}) for m in said]


def write(
    data: str, out: str, config: ConfigDict | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> dict[str, int]:
    """Every pair that the rankings, trees or pairs of `data` make, into the file `out` as JSON lines that read back as the same.

    `config` is a config's `data`, which says how rows are read; None is the defaults. Returns {"rows", "pairs", "ties",
    "without", "bad"}: ties are two answers that are equally good or the same, `without` rows that make no pair. `out` is whole
    or not there. Raises UserError, where `out` exists too, unless `force`.
    """
    config, target = default().data if config is None else config, new_file(out, force=force)
    counts = dict.fromkeys(("rows", "pairs", "ties", "without", "bad"), 0)
    bad: list[Rejected] = []
    with whole(target) as file:
        for example in read_examples((data,), config, say, want="pairs"):
            counts["rows"] += 1
            if isinstance(example, Rejected):
                bad.append(example)
                continue
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(example)]
            file.writelines(lines)
            counts["pairs"] += len(lines)
            counts["ties"] += math.comb(len(example.answers or ()), 2) - len(lines)
            counts["without"] += not lines
        counts["bad"] = len(bad)
        if config.on_bad_row == "error":
            fail_on(bad)
        if not counts["pairs"]:
            raise UserError(
                f"--data={data}: no row of it has an answer that is better than another, so there is no pair to write"
            )
    return counts
