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
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import IO, Any

from sftjax.data.chat import as_dict
from sftjax.data.example import Answer, Example, Message

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


def rows(examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
    """Every pair as {"prompt", "chosen", "rejected"}: raw text, or lists of turns; with tools where there are any."""
    for example in examples:
        answers = example.answers or ()
        for side in sides(answers, "pairs"):
            chosen, rejected = (written(answers[k].said) for k in side)
            prompt = written(example.messages or example.text or "")
            tools = {"tools": list(example.tools)} if example.tools else {}
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}


def written(said: tuple[Message, ...] | str) -> Any:
    if isinstance(said, str):
        return said
    return [as_dict(m) | ({} if m.loss is None else {"loss": m.loss}) for m in said]


def write(examples: Iterable[Example], out: IO[str]) -> int:
    """Writes `rows` as JSON lines, which read back as the same pairs; how many."""
    count = 0
    for row in rows(examples):
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    return count
