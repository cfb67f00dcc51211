"""Rows of text and label for a score head: the text as its tokenizer reads it, and after it the label's number.

    "thanks, see you" ham  ->  ids [40, 11, 7, 3, 0]   weights [0, 0, 0, 0, 1]        ham is label 0

No template: `tokenizer(text)` is what transformers' own pipelines give a classifier. A text that is cut keeps its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftjax.data.chat import Chat, Encoded
from sftjax.data.example import Example, RowError

SHOWN = 20  # labels that a mistake names


class Classes(Chat):
    """A tokenizer and the labels, in the order of their numbers."""

    def __init__(self, tokenizer: Any, labels: Sequence[str]):
        super().__init__(tokenizer)
        self.labels = tuple(labels)

    def encode(self, example: Example) -> Encoded:
        """The row's ids and weights. Raises RowError where its label is none of those known."""
        assert example.messages and example.label is not None
        if example.label not in self.labels:
            more = ", ..." if len(self.labels) > SHOWN else ""
            raise RowError("label", f"is {example.label!r}, none of the labels {', '.join(self.labels[:SHOWN])}{more}")
        ids = [*self.text_ids("\n\n".join(m.content for m in example.messages[:-1])), self.labels.index(example.label)]
        weights = np.zeros(len(ids), np.float32)
        weights[-1] = 1
        return Encoded(np.asarray(ids, np.int32), weights)

    def text_ids(self, text: str) -> list[int]:
        """Raises RowError where the text has no tokens."""
        ids = self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        if not ids:
            raise RowError("text", "has no tokens at all")
        return ids

    def check(self, encoded: Encoded, example: Example) -> str | None:
        return None  # a text has no terminator to learn
