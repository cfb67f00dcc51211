"""Whole sequences scored by a model with a score head: labels of texts, rewards of conversations.

model = sftjax.load("runs/spam/model")
labels, probabilities = sftjax.classify(model, ["Win a prize now", "See you at eight"])

model = sftjax.load("runs/preferences/reward")
sftjax.rewards(model, [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from sftjax import hosts
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.data.chat import Chat
from sftjax.data.classes import Classes
from sftjax.data.example import Message, RowError
from sftjax.data.pack import assemble
from sftjax.generate.engine import max_length
from sftjax.hf.model import Model
from sftjax.models.decoder import Decoder, forward
from sftjax.models.heads import segment_scores

LEAST = 32  # tokens of a row; longer ones are powers of two, so that few programs are compiled


def classify(model: Model, texts: Sequence[str], *, batch_size: int = 16) -> tuple[list[str], np.ndarray]:
    """(the label of each text, probabilities [n, C] float32 in the order of `model.config.labels`).

    A text that is longer than the model's positions is cut there. Raises UserError.
    """
    if len(model.config.labels) < 2:
        raise UserError(f"{model.directory}: has no score head of several labels, so it classifies nothing")
    chat = Classes(model.tokenizer, model.config.labels)
    try:
        sequences = [chat.text_ids(text)[: max_length(model.config)] for text in texts]
    except RowError as e:
        raise UserError(f"a text to classify {e.reason}") from e
    probabilities = np.asarray(jax.nn.softmax(score(model, sequences, batch_size=batch_size), -1))
    return [model.config.labels[i] for i in probabilities.argmax(-1)], probabilities


def rewards(model: Model, conversations: Sequence[Sequence[Message | dict[str, Any]]], *, batch_size: int = 16) -> np.ndarray:
    """[n] float32: the reward of each conversation's last answer, through the model's own template. Raises UserError."""
    refuse_no_reward(model.directory, model.config.labels)
    chat = Chat(model.tokenizer)
    try:
        sequences = [chat.tokenise(chat.render(messages))[0] for messages in conversations]
    except RowError as e:
        raise UserError(f"a conversation to score: {e}") from e
    return score(model, sequences, batch_size=batch_size)[:, 0]


def refuse_no_reward(of: Any, labels: Sequence[str]) -> None:
    """Raises UserError where these are not what a reward model's score head says."""
    if len(labels) != 1:
        has = f"one of {len(labels)} labels" if labels else "none"
        raise UserError(f"{of}: a reward model has a score head of one number, this has {has}")


def score(model: Model, sequences: Sequence[Sequence[int]], *, batch_size: int = 16) -> np.ndarray:
    """[n, C] float32: what the head makes of each sequence of tokens, none of them empty. Raises UserError for one too long."""
    limit = max_length(model.config)
    if long := [len(ids) for ids in sequences if len(ids) > limit]:
        raise UserError(f"a sequence of {long[0]} tokens is longer than the {limit} positions of {model.directory}")
    out = np.zeros((len(sequences), len(model.config.labels)), np.float32)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for at in range(0, len(order), batch_size):
        here = order[at : at + batch_size]
        rows = [[(np.asarray(sequences[i], np.int32), np.zeros(len(sequences[i]), np.float32), 1)] for i in here]
        length = max(LEAST, 1 << (len(sequences[here[0]]) - 1).bit_length())
        batch = assemble(rows + [[]] * (batch_size - len(rows)), length)
        out[here] = hosts.fetch(_scores(model.module, model.params, batch))[: len(here)]
    return out


@partial(jax.jit, static_argnums=0)
def _scores(module: Decoder, params: Any, batch: Batch) -> Array:
    return segment_scores(forward(module)(params, batch), batch.segments, 1)[0][:, 0]
