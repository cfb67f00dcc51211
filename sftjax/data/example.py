"""Example: one canonical row, whatever the file it came from looked like. It knows its file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `loss` is None (decided by data.loss_on), or the row's own weight of this turn's tokens."""

    role: str
    content: Any  # str, None (a pure tool call), or a list of typed parts for templates that know them
    loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # tool_calls, name, reasoning_content, ... as the template sees them


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a prompt: turns, or raw text after a raw prompt.

    rank 1 is best, and equals share one. Of an answer that stands alone (KTO) 1 says that it is good and 2 that it is bad.
    """

    said: tuple[Message, ...] | str
    rank: int


@dataclass(frozen=True, slots=True)
class Example:
    """Exactly one of `messages`, `completion` and `text` is set.

    messages    a conversation, rendered by the chat template
    completion  (prompt, completion) raw strings, no template; the completion and its EOS are trained
    text        plain text, every token trained

    With `answers` it is a preference: `messages` or `text` is the prompt alone, and these answer it, best first.
    """

    source: str  # the file (or hub id) as the user named it
    line: int  # 1-based: the line the row starts on, or its number: in .parquet, on the hub and in a .json that is all one line
    messages: tuple[Message, ...] | None = None
    completion: tuple[str, str] | None = None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    label: str | None = None
    answers: tuple[Answer, ...] | None = None
    columns: dict[str, Any] | None = None  # of a row that only asks, all it has beside what it asks: for reward functions
    tags: tuple[str, ...] = ()  # what kind of row it is, for evaluation; "reasoning/sums" is of the kind "reasoning" too

    def asked(self) -> tuple[Message, ...]:
        """The turns of a conversation without the answer that it ends with."""
        messages = self.messages or ()
        return messages[:-1] if messages and messages[-1].role == "assistant" else messages

    def turns(self) -> Iterator[Message]:
        """Those of a conversation, or of a prompt and then of its answers."""
        for said in (self.messages or (), *(answer.said for answer in self.answers or ())):
            yield from () if isinstance(said, str) else said

    def alone(self) -> Iterator[Example]:
        """Each answer with its prompt, as the example that supervised fine-tuning would see; itself where it has none."""
        if self.answers is None:
            yield self
        for answer in self.answers or ():
            if isinstance(answer.said, str):
                yield replace(self, text=None, completion=(self.text or "", answer.said), answers=None)
            else:  # the prompt's own answers are context
                prompt = tuple(replace(m, loss=0.0) for m in self.messages or ())
                yield replace(self, messages=prompt + answer.said, answers=None)


def split(example: Example) -> tuple[tuple[Message, ...] | str, str | None]:
    """The row without the answer it ends with, turns or raw text, and that answer; None where it has no text.

    Raises RowError where nothing comes before the answer.
    """
    if example.completion is not None:
        return example.completion[0], example.completion[1] or None
    if example.text is not None:
        return example.text, None
    *asked, last = example.messages or ()
    if last.role != "assistant":
        asked.append(last)  # it ends with a question
    if not asked:
        raise RowError("messages", "has nothing before the answer")
    return tuple(asked), last.content if last.role == "assistant" and isinstance(last.content, str) else None


class RowError(ValueError):
    """A row that cannot be used. `field` names the part at fault, the message says why, in plain words."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field, self.reason = field, reason
