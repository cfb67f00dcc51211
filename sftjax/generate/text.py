"""Writer: the text of an answer as its tokens come, cut exactly at a stop string.

A text may not be shown at once: bytes of an unfinished character come as U+FFFD, and the end may be the start of a
stop string. `shown` is what can no longer change.

The whole is not decoded anew for every token. Where the text so far ends with a whole character, its last token shows something
and is not a byte written as <0x41>, what comes next is read after that token as it is after all of them: a character's bytes are
complete, a run of <0x..>, of which one wrong byte spoils all, has ended, and what is done to a text's first space was done to
that token's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

CONTEXT = 4  # prompt tokens decoded along: many tokenizers drop a text's first space
# Decoders that make text of each token, or of bytes that follow each other; these two then make one text of all
BY_TOKEN = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
JOINING = {"ByteLevel", "Fuse"}


class Writer:
    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.stop_strings = tuple(s for s in stop_strings if s)
        self.splits = splits(tokenizer)
        self.before = self.context = list(prompt[-CONTEXT:])
        self.skip = self.beyond = len(self._decode(self.before))
        self.settled, self.fixed = 0, ""  # so many ids have this text; the others' is read after `context`, from `beyond` on
        self.ids: list[int] = []
        self.text = ""  # of all ids, up to a stop string
        self.sure = 0  # characters of it that nothing to come can change
        self.stopped = False  # at a stop string

    def add(self, ids: Sequence[int]) -> None:
        """Takes further tokens. At a stop string `stopped` is set and `ids` keeps those that lie before it."""
        self.ids += ids
        new = self._decode([*self.context, *self.ids[self.settled :]])[self.beyond :]
        self.text = self.fixed + new
        found = [(at + len(s), at) for s in self.stop_strings if (at := self.text.find(s, max(0, len(self.fixed) - len(s)))) >= 0]
        if found:
            self.stopped, self.text = True, self.text[: min(found)[1]]  # the first to end, however many tokens come at a time
            while self.ids and not self.text.startswith(self._text(self.ids)):
                self.ids.pop()
        elif ids and (alone := self._decode(self.ids[-1:])) and not self._is_byte(self.ids[-1]):
            self.sure = len(self.text.rstrip("\ufffd"))
            if self.splits and new and not new.endswith("\ufffd"):
                self.settled, self.fixed, self.context, self.beyond = len(self.ids), self.text, self.ids[-1:], len(alone)

    @property
    def shown(self) -> str:
        """The text without an unfinished character, a run of bytes or the beginnings of a stop string at its end."""
        return self.text if self.stopped else without_beginning(self.text[: self.sure], self.stop_strings)

    def _is_byte(self, token: int) -> bool:
        return (self.tokenizer.convert_ids_to_tokens(token) or "").startswith("<0x")

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode([*self.before, *ids])[self.skip :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def without_beginning(text: str, words: Iterable[str]) -> str:
    """`text` up to where one of `words` may have begun at its end."""
    starts = (word[:n] for word in words for n in range(min(len(word) - 1, len(text)), 0, -1))
    return text[: len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)]


def splits(tokenizer: Any) -> bool:
    """Whether a tokenizer's decoder is known to read what follows a token by no more than that token, as said above."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # which one written in Python has not
    if backend is None:
        return False
    held = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"decoders": []}
    joined = False
    for part in held.get("decoders", [held]):
        if part["type"] not in BY_TOKEN or part.get("stop") or (joined and part["type"] != "Strip"):
            return False
        joined |= part["type"] in JOINING
    return True
