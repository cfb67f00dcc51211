"""Raw rows of preferences to a prompt and its answers, best first.

    pair      chosen, rejected
    ranking   answers: best first, or with ranks (lower is better) or scores (higher is better)
    unpaired  one answer and a label: good or bad
    tree      Open Assistant's message trees: a ranking wherever a message has several ranked replies

The prompt is a column: `prompt` (raw text before raw answers, else a user's turn), turns, or Alpaca's instruction and input.
Where there is none, or where every answer begins with a turn that is no assistant's, the answers are whole conversations
and the turns that they begin with in common are the prompt. A conversation may be a transcript: a text in which "Human:" and
"Assistant:" at the start, or after a blank line, begin a turn; white space around a turn is not part of it, and a speaker's
turns in a row are one turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from sftjax.data.conversation import ROLES, check_answered, conversation, listed, named
from sftjax.data.example import Answer, Message, RowError
from sftjax.data.fields import Row, Wishes, asked, dialogue, refuse_beside_raw_text
from sftjax.data.layouts import PROMPTS

SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
LABELS = {"true": 1, "1": 1, "false": 2, "0": 2}

Said = tuple[Message, ...] | str
Given = Sequence[tuple[Any, str]]  # answers as the row holds them, each with the name of its place


def pair(row: Row, wishes: Wishes) -> Iterator[dict[str, Any]]:
    prompt, said = _answered(row, wishes, [(row.get(c), row.name(c)) for c in ("chosen", "rejected")], _prompt_column(row))
    yield prompt | {"answers": tuple(Answer(s, rank) for rank, s in enumerate(said, 1))}


def ranking(row: Row, wishes: Wishes) -> Iterator[dict[str, Any]]:
    name = row.name("answers")
    held = listed(row.get("answers"), name)
    if len(held) < 2:
        raise RowError(name, f"is {named(held)}, and a ranking needs two answers")
    prompt, said = _answered(row, wishes, [(a, f"{name}[{i}]") for i, a in enumerate(held)], _prompt_column(row))
    if row.get("ranks") is not None:
        order = _numbers(row, "ranks", len(held))
    elif row.get("scores") is not None:
        order = [-score for score in _numbers(row, "scores", len(held))]
    else:
        order = list(range(len(held)))
    yield prompt | {"answers": ranked(said, order)}


def unpaired(row: Row, wishes: Wishes) -> Iterator[dict[str, Any]]:
    held = row.get("label")
    rank = LABELS.get(str(held).strip().lower()) if isinstance(held, (bool, int, float, str)) else None
    if rank is None:
        raise RowError(row.name("label"), "is missing or null" if held is None else f"is {named(held)}, must be true or false")
    column: str | None = _prompt_column(row)
    answer = next((c for c in ("completion", "output") if c in row.columns), None)
    if answer is None:  # the conversation ends with it
        answer, column = column, None
    assert answer is not None
    prompt, (said,) = _answered(row, wishes, [(row.get(answer), row.name(answer))], column)
    yield prompt | {"answers": (Answer(said, rank),)}


def tree(row: Row, wishes: Wishes) -> Iterator[dict[str, Any]]:
    root = row.row.get("prompt", row.row)
    found = list(_groups(root, (), "prompt" if "prompt" in row.row else ""))
    if not found:
        raise RowError("replies", "nowhere in this tree do two replies to one message have a rank")
    for prompt, replies in found:
        said = [(Message("assistant", text),) for _, text in replies]
        yield dialogue(row, wishes, prompt) | {"answers": ranked(said, [rank for rank, _ in replies])}


BUILD: dict[str, Callable[[Row, Wishes], Iterator[dict[str, Any]]]] = {
    "pair": pair,
    "ranking": ranking,
    "unpaired": unpaired,
    "tree": tree,
}


def ranked(said: Sequence[Said], order: Sequence[float]) -> tuple[Answer, ...]:
    """The answers from the least number of `order` to the greatest, with ranks 1, 2, ...; equal numbers share one."""
    ranks = {number: rank for rank, number in enumerate(sorted(set(order)), 1)}
    return tuple(sorted((Answer(s, ranks[number]) for s, number in zip(said, order)), key=lambda answer: answer.rank))


def _prompt_column(row: Row) -> str | None:
    return next((column for column in PROMPTS if column in row.columns), None)


def _answered(row: Row, wishes: Wishes, given: Given, column: str | None) -> tuple[dict[str, Any], list[Said]]:
    """The fields of an Example that hold the prompt, which `column` names, and the answers to it."""
    said = [_said(row, wishes, held, where) for held, where in given]
    turns = [s for s in said if not isinstance(s, str)]
    whole = [s for s in turns if s[0].role != "assistant"]
    if column is None or (whole and len(whole) == len(said)):
        prompt, rest = _shared([_transcript(s, where) if isinstance(s, str) else s for s, (_, where) in zip(said, given)], given)
        if column is not None:
            _check_copy(row, wishes, column, prompt)
        return dialogue(row, wishes, prompt), rest
    for s, (_, where) in zip(said, given):
        if not isinstance(s, str):
            if s[0].role != "assistant":
                raise RowError(f"{where}[0]", f"is a turn of the role {s[0].role}: an answer begins with the assistant's")
            check_answered(s, where)
    if column == "prompt" and isinstance(row.get("prompt"), str) and not turns:
        refuse_beside_raw_text(row, wishes)
        return {"text": row.text("prompt")}, said
    answers: list[Said] = [(Message("assistant", s),) if isinstance(s, str) else s for s in said]
    return dialogue(row, wishes, _asked(row, wishes, column)), answers


def _said(row: Row, wishes: Wishes, held: Any, where: str) -> Said:
    if isinstance(held, str):
        return held
    turns = [held] if isinstance(held, dict) else held
    return conversation(turns, where, wishes.roles, row.columns, silent=True)


def _asked(row: Row, wishes: Wishes, column: str) -> tuple[Message, ...]:
    if column == "instruction":
        return asked(row)
    if column == "prompt" and isinstance(row.get("prompt"), str):
        return (Message("user", row.filled("prompt")),)
    turns = conversation(row.get(column), row.name(column), wishes.roles, row.columns, silent=True)
    return tuple(replace(m, loss=None) for m in turns)  # a prompt is never trained


def _shared(conversations: Sequence[tuple[Message, ...]], given: Given) -> tuple[tuple[Message, ...], list[Said]]:
    """The turns that the conversations begin with in common, but for an answer each, and what is left of each."""
    first, n = conversations[0], 0
    most = min(len(turns) for turns in conversations) - 1
    while n < most and all(_same(turns[n], first[n]) for turns in conversations):
        n += 1
    for turns, (_, where) in zip(conversations, given):
        if turns[n].role != "assistant":
            raise RowError(f"{where}[{n}]", f"is a turn of the role {turns[n].role}, where the prompt ends and the answer begins")
    if not n:
        raise RowError(given[0][1], "has no prompt: " + _lacks(given))
    return tuple(replace(m, loss=None) for m in first[:n]), [turns[n:] for turns in conversations]


def _lacks(given: Given) -> str:
    if len(given) == 1:
        return "it begins with the answer"
    return f"it begins with no turn that {' and '.join(where for _, where in given[1:])} begins with too"


def _same(a: Message, b: Message) -> bool:
    return (a.role, a.content, a.extra) == (b.role, b.content, b.extra)


def _check_copy(row: Row, wishes: Wishes, column: str, prompt: tuple[Message, ...]) -> None:
    """A prompt beside whole conversations only says again what they begin with."""
    own = _asked(row, wishes, column)
    if not all(any(_same(m, turn) for turn in prompt) for m in own):
        raise RowError(row.name(column), "says other than the turns that the answers begin with; keep one of the two")


def _transcript(text: str, where: str) -> tuple[Message, ...]:
    """The turns of a text, by the rule at the top of this file."""
    before, *rest = SPEAKER.split(text)
    if before.strip() or not rest:
        raise RowError(where, "is text without a prompt: no column holds one, and it is no transcript of Human: and Assistant:")
    turns = groupby(zip(rest[::2], rest[1::2]), key=lambda turn: turn[0])
    said = [(ROLES[name.lower()], "\n\n".join(text.strip() for _, text in run)) for name, run in turns]
    return tuple(Message(role, text) for role, text in said)


def _numbers(row: Row, column: str, count: int) -> list[float]:
    name = row.name(column)
    held = listed(row.get(column), name)
    for i, number in enumerate(held):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise RowError(f"{name}[{i}]", f"is {named(number)}, must be a number")
    if len(held) != count:
        raise RowError(name, f"has {len(held)} numbers for {count} answers")
    return held


def _groups(node: Any, before: tuple[Message, ...], where: str) -> Iterator[tuple[tuple[Message, ...], list[tuple[float, str]]]]:
    """(the turns up to a message, [(rank, text) of its replies]) wherever two or more replies have a rank."""
    if not isinstance(node, dict) or not isinstance(node.get("text"), str) or node.get("role") not in ROLES:
        raise RowError(where, "is not a message of a tree: it needs a text, a role and replies")
    path = (*before, Message(ROLES[node["role"]], node["text"]))
    replies = node.get("replies") or []
    marked = [r for r in replies if isinstance(r, dict) and isinstance(r.get("rank"), int) and not r.get("deleted")]
    answers = [(r["rank"], r["text"]) for r in marked if ROLES.get(str(r.get("role"))) == "assistant"]
    if len(answers) > 1:
        yield path, answers
    for i, reply in enumerate(replies):
        yield from _groups(reply, path, f"{where}.replies[{i}]".lstrip("."))
