"""A survey: what whole files hold, read as training would read them, without a model. Of a row some numbers are kept.

    read = good + bad + equals + held_out + again

bad       cannot be used
equals    a preference between answers that are equally good or the same, which training drops
held_out  of the others, what a held-out file has too: the same row, or the same question where one of the two is a preference or
          only asks
again     of those that are left, what an earlier row says word for word, whatever its loss weights and tags
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np

from sftjax.data.cache import content_key
from sftjax.data.encode import keys
from sftjax.data.example import Answer, Example, Message
from sftjax.data.formats import SHOWN, Rejected, counted, read_rows
from sftjax.data.pairs import sides

GOOD, BAD, EQUALS, HELD_OUT, AGAIN = range(5)
FATES = ("good", "bad", "equals", "held_out", "again")
# a row of a file; and what it says, of a tree each of its rankings: numbered as that row, hashes of all of it, of what it is
# known by where rows are split, of what they are split by, of its question (0: there is none), and whether that has one answer
ROW = np.dtype([("file", "<i4"), ("line", "<i8"), ("fate", "<i1"), ("silent", "?")])
SAID = np.dtype([("row", "<i8"), ("whole", "<u8"), ("key", "<u8"), ("prompt", "<u8"), ("asked", "<u8"), ("answered", "?")])
PACK_ROW, PACK_SAID = Struct("<iqb?").pack, Struct("<qQQQQ?").pack  # the same, of plain numbers


@dataclass(frozen=True)
class Survey:
    files: list[str]
    rows: np.ndarray  # ROW, in the order of the files; a fate is GOOD, BAD or EQUALS as far as a row alone can tell
    said: np.ndarray  # SAID, likewise
    formats: Counter[str]  # rows by format
    roles: Counter[str]  # turns by role
    bad: list[Rejected]  # the first of them

    def where(self, row: int) -> str:
        return f"{self.files[self.rows['file'][row]]}:{self.rows['line'][row]}"


def survey(spec: Any, data: Any, say: Callable[[str], None] | None = None, want: str = "any") -> Survey:
    """The rows of the sources in `spec`; the arguments are those of formats.read_examples. Raises UserError as that does."""
    files: dict[str, int] = {}
    rows, said = bytearray(), bytearray()
    formats, roles = Counter[str](), Counter[str]()
    bad: list[Rejected] = []
    for number, row in enumerate(read_rows(spec, data, say, want)):
        found = [] if isinstance(row.found, Rejected) else row.found
        if isinstance(row.found, Rejected) and len(bad) < SHOWN:
            bad.append(row.found)
        for example in found:
            said += PACK_SAID(number, *hashes(example))
            roles.update(message.role for message in example.turns())
        if found and row.layout:
            formats[row.layout.format] += 1
        fate = GOOD if any(map(tells, found)) else EQUALS if found else BAD
        silent = any(empty(answer) for example in found for answer in example.answers or ())
        rows += PACK_ROW(files.setdefault(row.file, len(files)), row.line, fate, silent)
    return Survey(list(files), np.frombuffer(rows, ROW), np.frombuffer(said, SAID), formats, roles, bad)


def hashes(example: Example) -> tuple[int, int, int, int, bool]:
    """What SAID has but for the row's number."""
    asks = example.columns is not None
    key, prompt = keys(example, asks)
    whole = key
    if asks:  # one prompt with two right answers beside it is two rows
        text = json.dumps([key, example.columns], sort_keys=True, default=str)
        whole = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    answered = example.answers is None and example.text is None and not asks
    return whole, key, prompt, question_key(example), answered


def question_key(example: Example) -> int:
    """64 bits of a hash of what the row asks, as turns or as raw text; 0 for plain text."""
    if example.text is not None and example.answers is None and example.columns is None:
        return 0
    raw = example.completion[0] if example.completion else example.text
    turns = (example.messages or ()) if example.answers is not None else example.asked()
    turns = turns if raw is None else (Message("user", raw),)
    return content_key(Example("", 0, turns, tools=example.tools))


def tells(example: Example) -> bool:
    """Whether there is something to learn: of answers, which is better, or that one is good or bad."""
    return example.answers is None or len(example.answers) == 1 or bool(sides(example.answers, "pairs"))


def empty(answer: Answer) -> bool:
    said = [answer.said] if isinstance(answer.said, str) else [m.content or m.extra for m in answer.said]
    return not any(part.strip() if isinstance(part, str) else part for part in said)


def sift(
    spec: Any, held: Any, data: Any, say: Callable[[str], None], want: str = "any"
) -> tuple[Survey, np.ndarray, Survey | None]:
    """The survey of `spec`, the fate of every row, and the survey of the held-out rows that `held` names, if it names any."""
    found, other = survey(spec, data, say, want), survey(held, data, say, want) if held else None
    if other and (bad := int((other.rows["fate"] == BAD).sum())):
        say(f"{held}: {counted(bad)} cannot be used, and nothing is held against {'it' if bad == 1 else 'them'}: {other.bad[0]}")
    return found, fates(found, other), other


def fates(survey: Survey, held: Survey | None = None) -> np.ndarray:
    """The fate of every row, int8 [rows]; `held` are held-out rows."""
    fate, said = survey.rows["fate"].copy(), survey.said
    if held is not None:
        other, asks = held.said, said["asked"] > 0
        same = np.isin(said["prompt"], other["prompt"]) | (asks & np.isin(said["asked"], other["asked"][~other["answered"]]))
        same |= asks & ~said["answered"] & np.isin(said["asked"], other["asked"])
        both = said["row"][same]
        fate[both[fate[both] == GOOD]] = HELD_OUT
    said = said[fate[said["row"]] == GOOD]
    fresh = np.zeros(len(fate), bool)
    fresh[said["row"][np.unique(said["whole"], return_index=True)[1]]] = True
    fate[(fate == GOOD) & ~fresh] = AGAIN
    return fate


def earlier(survey: Survey, fate: np.ndarray) -> Iterator[tuple[int, int]]:
    """(a row that says what an earlier one says, the first that does), in order."""
    said = survey.said[np.isin(fate[survey.said["row"]], (GOOD, AGAIN))]
    _, first, same = np.unique(said["whole"], return_index=True, return_inverse=True)
    _, at = np.unique(said["row"], return_index=True)
    for i in at[fate[said["row"][at]] == AGAIN].tolist():
        yield int(said["row"][i]), int(said["row"][first[same[i]]])


def disputed(survey: Survey, fate: np.ndarray) -> list[np.ndarray]:
    """The rows of each question that has several answers, which are not compared; questions in order of their first rows."""
    said = survey.said[(fate[survey.said["row"]] == GOOD) & survey.said["answered"]]
    _, same, counts = np.unique(said["asked"], return_inverse=True, return_counts=True)
    said = said[counts[same] > 1]
    order = np.argsort(said["asked"], kind="stable")
    runs = np.split(said["row"][order], np.flatnonzero(np.diff(said["asked"][order])) + 1)
    return sorted((rows for rows in runs if len(rows)), key=lambda rows: int(rows[0]))


def asked_too(survey: Survey, fate: np.ndarray, held: Survey) -> np.ndarray:
    """The good rows with a held-out question and another answer."""
    said = survey.said
    return np.unique(said["row"][(fate[said["row"]] == GOOD) & said["answered"] & np.isin(said["asked"], held.said["asked"])])
