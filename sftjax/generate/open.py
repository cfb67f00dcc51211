"""A checkpoint opened to answer: its engine, and the template that it is asked through."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.generate.engine import Engine
from sftjax.hf.load import read_json
from sftjax.hf.model import Model, load


def open_engine(model: str, adapter: str | None = None, quantize: str | None = None) -> tuple[Engine, Chat]:
    """A checkpoint, in few bits and with an adapter over it where they are given, ready to answer. Raises UserError."""
    return engine_of(open_model(model, adapter, quantize))


def open_model(model: str, adapter: str | None = None, quantize: str | None = None) -> Model:
    """A checkpoint that generates text. Raises UserError."""
    m = load(model, adapter=adapter, quantize=quantize)
    if m.config.labels:
        verb = "sftjax.classify(model, texts)" if len(m.config.labels) > 1 else "sftjax.rewards(model, conversations)"
        raise UserError(
            f"--model={adapter or model}: ends with a score head ({', '.join(m.config.labels[:5])}), which generates no text; "
            f"from Python {verb} gives its numbers"
        )
    return m


def engine_of(m: Model) -> tuple[Engine, Chat]:
    chat = Chat(m.tokenizer, day=None)
    return Engine(m.module, m.params, stop_ids=ends(m.directory, chat)), chat


def ends(directory: Path, chat: Chat) -> tuple[int, ...]:
    """The tokens that end an answer: in training, evaluation and talk alike. generation_config.json is where some families name
    more of them than the tokenizer does."""
    file = directory / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.is_file() else None
    return tuple(dict.fromkeys([*chat.stop_ids, *np.ravel([] if eos is None else eos).tolist()]))
