"""Writer: the text of an answer as its tokens come, cut exactly at a stop string.

A text may not be shown at once: bytes of an unfinished character come as U+FFFD, and the end may be the start of a
stop string. `shown` is what can no longer change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 4  # prompt tokens decoded along: many tokenizers drop a text's first space


class Writer:
    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.stop_strings = tuple(s for s in stop_strings if s)
        self.before = list(prompt[-CONTEXT:])
        self.skip = len(self._decode(self.before))
        self.ids: list[int] = []
        self.text = ""  # of all ids, up to a stop string
        self.stopped = False  # at a stop string

    def add(self, ids: Sequence[int]) -> None:
        """Takes further tokens. At a stop string `stopped` is set and `ids` keeps those that lie before it."""
        self.ids += ids
        self.text = self._text(self.ids)
        found = [at for s in self.stop_strings if (at := self.text.find(s)) >= 0]
        if found:
            self.stopped, self.text = True, self.text[: min(found)]
            while self.ids and not self.text.startswith(self._text(self.ids)):
                self.ids.pop()

    @property
    def shown(self) -> str:
        """The text without an unfinished character or the beginnings of a stop string at its end."""
        if self.stopped:
            return self.text
        text = self.text.rstrip("\ufffd")
        starts = (s[:n] for s in self.stop_strings for n in range(len(s) - 1, 0, -1))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held]

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode([*self.before, *ids])[self.skip :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
