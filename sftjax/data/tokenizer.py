"""A run's tokenizer: the checkpoint's, or the one its adapter was trained with, and the tokens that a config adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.config import UserError, parts
from sftjax.data.chat import Chat, load_tokenizer, prepare
from sftjax.data.classes import Classes
from sftjax.data.formats import labels as all_labels
from sftjax.data.pipeline import wanted

MOST = 1000  # labels of a classifier: above this many, the column holds something else


def tokenizer_place(base: str | Path, adapter: Path | None = None) -> str | Path:
    """What lies with an adapter is what it was trained with, and goes before the base's."""
    return adapter if adapter and (adapter / "tokenizer.json").is_file() else base


def open_tokenizer(
    base: str | Path, adapter: Path | None = None, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer of `base`, a directory or hub id, under an adapter's directory: its tokenizer and its chat template,
    where it has them. Raises UserError."""
    place = tokenizer_place(base, adapter)
    tokenizer = load_tokenizer(place, trust_remote_code, revision)
    if adapter and place != adapter and (template := adapter / "chat_template.jinja").is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def chat_for(config: ConfigDict, tokenizer: Any, labels: Sequence[str] = ()) -> tuple[Chat, list[str]]:
    """The Chat that the config trains through, and the tokens that `tokenizer` is given (in place) for tokens.train and the
    template. Raises UserError.

    `labels` are a classifier's, in order; where it has none yet, those of the training data."""
    had = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(parts(config.tokens.train)) if token not in had]
    tokenizer.add_tokens(new, special_tokens=True)
    if config.task == "pretrain":
        return Chat(tokenizer, loss_on="all"), new
    if wanted(config) == "classes":
        found = labels or all_labels(config.data, MOST, "a score head")
        if len(found) < 2:
            raise UserError(f"the training data has the label {', '.join(found) or '(none)'} alone; a classifier needs two")
        return Classes(tokenizer, found), new
    chat, more = prepare(tokenizer, config.data.template, loss_on=config.data.loss_on)
    return chat, new + more
