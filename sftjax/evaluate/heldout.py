"""Held-out rows as questions: the model gives the answer that the row ends with, and the two are compared.

Example -> Question(ids, expected) -> Engine -> Answer -> summary, samples for the report
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.chat import Chat
from sftjax.data.example import Example, Message, RowError, split
from sftjax.evaluate.metrics import Sums, all_sums, exact_match, fitting, mean, total
from sftjax.generate.engine import Engine, Generated


class Question(NamedTuple):
    """What the model is given, as ids and for people to read, and what the row answers, but for its thought; None where it has
    no text."""

    ids: list[int]
    prompt: str
    expected: str | None
    messages: tuple[Message, ...] = ()  # that were asked, where the row is a conversation
    label: str | None = None
    tags: tuple[str, ...] = ()
    where: str = ""  # file:line


@dataclass(frozen=True)
class Answer:
    """Plain values only: it is kept as JSON. `text` is what it says, as Chat.said has it, `raw` all the text that was made and
    `tokens` its number of tokens. `repeated` and `overlong` as `loops` and `too_long` say."""

    prompt: str
    expected: str
    text: str
    stopped: bool
    exact: bool
    tokens: int
    label: str | None = None
    repeated: bool = False
    overlong: bool = False
    raw: str = ""


def question(chat: Chat, example: Example) -> Question:
    """The row without the answer it ends with. Raises RowError where it asks nothing."""
    more: dict[str, Any] = {"label": example.label, "tags": example.tags, "where": f"{example.source}:{example.line}"}
    asked, answer = split(example)
    ids, answer = chat.ask(example), answer and chat.said(answer)
    if isinstance(asked, str):
        return Question(ids, asked, answer, **more)
    return Question(ids, readable(asked), answer, asked, **more)


def readable(messages: Sequence[Message]) -> str:
    """The one question as it is, or a line a turn."""
    if len(messages) == 1:
        return str(messages[0].content)
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


def questions(chat: Chat, examples: Iterable[Example]) -> Iterator[Question]:
    """Those of the examples that can be asked and have a text to compare the answer with, in order.

    A preference asks for its best answer, and where a prompt has several pairs it is asked once.
    """
    asked: set[tuple[int, ...]] = set()
    for example in examples:
        preferred = example.answers is not None
        if example.answers:
            if example.answers[0].rank > 1:
                continue  # its answers are not the best there are, or it is a bad one
            example = next(example.alone())
        if example.text is not None:
            continue  # plain text asks nothing
        try:
            q = question(chat, example)
        except RowError:
            continue  # this template has no way to ask it
        again = preferred and tuple(q.ids) in asked
        asked.add(tuple(q.ids))
        if q.expected is not None and not again:
            yield q


def answers(engine: Engine, questions: Sequence[Question], *, chat: Chat, max_new_tokens: int, **options: Any) -> list[Answer]:
    """The engine's answer to each of `questions`, in order.

    A prompt that leaves no room within the model's positions is answered by nothing. `options` as in Engine.generate.
    """
    fitting = [q.ids for q in questions if engine.fits(q.ids)]
    made = iter(engine.generate(fitting, max_new_tokens=max_new_tokens, tokenizer=chat.tokenizer, **options))
    out = []
    for q in questions:
        g = next(made) if engine.fits(q.ids) else Generated([], False)
        text, expected = chat.said(g.text, g.ids), q.expected or ""
        n = len(g.ids) if text == g.text else len(chat.tokenise(text)[0])  # a thought may be as long as it likes
        exact, overlong = exact_match(text, expected), too_long(n, len(chat.tokenise(expected)[0]))
        out.append(Answer(q.prompt, expected, text, g.stopped, exact, len(g.ids), q.label, loops(g.ids), overlong, g.text))
    return out


def loops(ids: Sequence[int], least: int = 16) -> bool:
    """Whether somewhere an n-gram stands four times in a row or more, and at least `least` tokens long in all."""
    x = np.asarray(ids)
    for n in range(1, len(x) // 4 + 1):
        breaks = np.flatnonzero(np.append(x[n:] != x[:-n], True))  # a run of m tokens that equal the one n before: m + n tokens
        if np.diff(breaks, prepend=-1).max() - 1 >= max(3 * n, least - n):
            return True
    return False


def too_long(tokens: int, expected: int) -> bool:
    """Whether an answer has more than twice the tokens expected, and eight more at least."""
    return tokens > max(2 * expected, expected + 8)


def health(answers: Sequence[Answer]) -> dict[str, Sums]:
    """What a loss does not show: shares of the answers that stopped by themselves, are empty, loop and run on; their tokens."""
    return {
        "stop_rate": mean([a.stopped for a in answers]),
        "empty": mean([not a.text.strip() for a in answers]),
        "repeated": mean([a.repeated for a in answers]),
        "overlong": mean([a.overlong for a in answers]),
        "mean_length": mean([a.tokens for a in answers]),
    }


def sums(answers: Sequence[Answer], metrics: Sequence[str]) -> dict[str, Sums]:
    """Every figure of the answers, the metrics first."""
    return all_sums(metrics, [a.text for a in answers], [a.expected for a in answers]) | health(answers)


def refuse_missing(metrics: Sequence[str]) -> None:
    """Raises UserError where a metric's library is missing: before anything long has begun."""
    all_sums(metrics, ["a"], ["a"])


def suited(expected: Sequence[str], labels: Sequence[str | None]) -> tuple[str, ...]:
    """The metrics for rows that expect these texts."""
    return fitting(expected, labels=bool(labels) and all(label is not None for label in labels))


def summary(answers: Sequence[Answer], metrics: Sequence[str] = ()) -> dict[str, float]:
    """The exact match, the metrics beside it, and `health`. With labels accuracy is the exact match, and macro_f1 is there."""
    if not answers:
        return {}
    metrics = metrics or suited([a.expected for a in answers], [a.label for a in answers])
    named = dict.fromkeys(("exact_match", *(name for name in metrics if name != "accuracy")))
    return {name: total(of) for name, of in sums(answers, [*named]).items()}


def samples(base: Sequence[Answer], tuned: Sequence[Answer]) -> list[dict[str, Any]]:
    """Rows of samples.jsonl, which the report reads: both models' answers to the same prompts."""
    return [
        {
            "prompt": b.prompt,
            "expected": b.expected,
            "base": b.text,
            "tuned": t.text,
            "base_stopped": b.stopped,
            "tuned_stopped": t.stopped,
            "exact_base": b.exact,
            "exact_tuned": t.exact,
        }
        for b, t in zip(base, tuned, strict=True)
    ]
