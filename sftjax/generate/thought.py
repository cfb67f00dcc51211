"""Parts: what an answer thinks and what it says, apart as they come.

    <think>\nHm.\n</think>\n\nSeven.                                                              tags that are text: Qwen3's
    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Seven.   special tokens: GPT-OSS's

A thought begins where the prompt has opened one, or with what opens one at the answer's head; it ends with the first text that
ends one (Chat knows both). Special tokens are in no text: from one of them on tokens are held back until what they open is known.
"""

from __future__ import annotations

from collections.abc import Sequence

from sftjax.data.chat import Chat
from sftjax.generate.text import Writer, without_beginning

LOOK = 64  # tokens, of a prompt's end or an answer's beginning, in which a thought may be opened


class Parts:
    """`apart` is False where all that comes is the answer."""

    def __init__(self, chat: Chat, prompt: Sequence[int], stop_strings: Sequence[str] = (), apart: bool = True):
        self.chat = chat
        self.writer = Writer(chat.tokenizer, stop_strings, prompt)
        openers = tuple(opening for opening, thinks in chat.openings.items() if thinks)
        self.thinking = apart and self._raw(prompt[-LOOK:]).rstrip().endswith(openers)
        self.head: list[int] | None = [] if apart and not self.thinking else None  # what may open something, from `held` on
        self.held = self.start = 0  # where the thought that goes on begins, or the answer
        self.thoughts: list[str] = []  # those that have ended
        self.led = False  # something stood before the answer

    def add(self, ids: Sequence[int]) -> None:
        """Takes further tokens, up to a stop string."""
        for token in ids:
            if self.writer.stopped:
                return
            before = len(self.writer.text)
            self.writer.add([token])
            if self.thinking and self.head is None and token in self.chat.special_ids:
                self.head, self.held = [], before
            if self.head is not None:
                self._open(token, self.head)
            elif self.thinking:
                at = max(self.start, before - max(map(len, self.chat.ends)))
                if end := self.chat.thought.search(self.writer.text, at):
                    self._turn(False, *end.span())

    def _open(self, token: int, head: list[int]) -> None:
        head.append(token)
        raw, openings = self._raw(head).lstrip(), self.chat.openings
        if len(head) < LOOK and any(opening.startswith(raw) and opening != raw for opening in openings):
            return
        self.head = None
        found = max((opening for opening in openings if raw.startswith(opening)), key=len, default=None)
        if found is not None:
            rest = self.chat.special.sub("", raw[len(found) :])
            self._turn(openings[found], self.held, max(0, len(self.writer.text) - len(rest)))

    def _turn(self, thinking: bool, end: int, start: int) -> None:
        if self.thinking:
            self.thoughts.append(self.writer.text[self.start : end])
        self.thinking, self.start, self.led = thinking, start, True

    @property
    def shown(self) -> tuple[str, str]:
        """(thought, answer) so far, of which nothing can change any more."""
        if self.head is not None:
            return self._apart(self.writer.text[: self.held])
        text = self.writer.shown
        return self._apart(without_beginning(text, self.chat.ends) if self.thinking else text)

    def whole(self, ended: bool) -> tuple[str, str]:
        """(thought, answer) where no more tokens come. A model that has `ended` its turn in a thought has said what it thought:
        one tuned on plain answers does so where its template opens a thought for it."""
        thought, said = self._apart(self.writer.text[: self.held] if self.thinking and self.head else self.writer.text)
        return thought, thought if ended and self.thinking else said

    def _apart(self, text: str) -> tuple[str, str]:
        rest = text[self.start :]
        thoughts = [*self.thoughts, rest] if self.thinking else self.thoughts
        said = "" if self.thinking else rest.lstrip() if self.led else rest
        return "\n".join(filter(None, map(str.strip, thoughts))), said

    def _raw(self, ids: Sequence[int]) -> str:
        return self.chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
