"""Held-out rows as questions: the model gives the answer that the row ends with, and the two are compared.

Example -> Question(ids, expected) -> Engine -> Answer -> summary, samples for the report
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sftjax.data.chat import Chat
from sftjax.data.example import Example, Message, RowError
from sftjax.evaluate.metrics import exact_match, macro_f1
from sftjax.generate.engine import Engine


class Question(NamedTuple):
    """What the model is given, as ids and for people to read, and what the row answers; None where it has no text."""

    ids: list[int]
    prompt: str
    expected: str | None
    messages: tuple[Message, ...] = ()  # that were asked, where the row is a conversation
    label: str | None = None


@dataclass(frozen=True)
class Answer:
    """Plain values only: it is kept as JSON."""

    prompt: str
    expected: str
    text: str
    stopped: bool
    exact: bool
    tokens: int
    label: str | None = None


def question(chat: Chat, example: Example) -> Question:
    """The row without the answer it ends with. Raises RowError where it asks nothing."""
    if example.completion is not None:
        prompt, expected = example.completion
        return Question([*chat.start_ids, *chat.tokenise(prompt)[0]], prompt, expected or None, label=example.label)
    if example.text is not None:
        return Question([*chat.start_ids, *chat.tokenise(example.text)[0]], example.text, None)
    *asked, last = example.messages or ()
    if last.role != "assistant":
        asked.append(last)  # it ends with a question
    if not asked:
        raise RowError("messages", "has nothing before the answer")
    answer = last.content if last.role == "assistant" and isinstance(last.content, str) else None
    return Question(chat.prompt(asked, example.tools), readable(asked), answer, tuple(asked), example.label)


def readable(messages: Sequence[Message]) -> str:
    """The one question as it is, or a line a turn."""
    if len(messages) == 1:
        return str(messages[0].content)
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


def questions(chat: Chat, examples: Iterable[Example]) -> Iterator[Question]:
    """Those of the examples that can be asked and have a text to compare the answer with, in order."""
    for example in examples:
        if example.text is not None:
            continue  # plain text asks nothing
        try:
            q = question(chat, example)
        except RowError:
            continue  # this template has no way to ask it
        if q.expected is not None:
            yield q


def answers(
    engine: Engine, questions: Sequence[Question], *, tokenizer: Any, max_new_tokens: int, **options: Any
) -> list[Answer]:
    """The engine's answer to each of `questions`, in order.

    A prompt that leaves no room within the model's positions is answered by nothing. `options` as in Engine.generate.
    """
    fitting = [q.ids for q in questions if engine.fits(q.ids)]
    made = iter(engine.generate(fitting, max_new_tokens=max_new_tokens, tokenizer=tokenizer, **options))
    out = []
    for q in questions:
        g = next(made) if engine.fits(q.ids) else None
        text = g.text if g else ""
        exact = exact_match(text, q.expected or "")
        out.append(Answer(q.prompt, q.expected or "", text, bool(g and g.stopped), exact, len(g.ids) if g else 0, q.label))
    return out


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of the answers; `mean_length` in tokens. With labels, `macro_f1` too: accuracy is then the exact match."""
    if not answers:
        return {}
    n = len(answers)
    out = {
        "exact_match": sum(a.exact for a in answers) / n,
        "stop_rate": sum(a.stopped for a in answers) / n,
        "empty": sum(not a.text.strip() for a in answers) / n,
        "mean_length": sum(a.tokens for a in answers) / n,
    }
    if all(a.label is not None for a in answers):
        out["macro_f1"] = macro_f1([a.text for a in answers], [a.expected for a in answers])
    return out


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
