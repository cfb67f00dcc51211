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
from sftjax.data.chat import Chat, as_dict
from sftjax.data.classes import Classes
from sftjax.data.conversation import conversation, named
from sftjax.data.example import Message, RowError
from sftjax.data.pack import assemble
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
    if isinstance(texts, str):
        raise UserError("classify: needs several texts, not one; put it in a list")
    if wrong := [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise UserError(f"classify: text {wrong[0][0]} is {named(wrong[0][1])}, must be text")
    chat = Classes(model.tokenizer, model.config.labels)
    try:
        sequences = [chat.text_ids(text)[: model.config.reach] for text in texts]
    except RowError as e:
        raise UserError(f"a text to classify {e.reason}") from e
    probabilities = np.asarray(jax.nn.softmax(score(model, sequences, batch_size=batch_size), -1))
    return [model.config.labels[i] for i in probabilities.argmax(-1)], probabilities


def rewards(model: Model, conversations: Sequence[Sequence[Message | dict[str, Any]]], *, batch_size: int = 16) -> np.ndarray:
    """[n] float32: the reward of the answer that each conversation ends with, through the model's own template.

    Raises UserError.
    """
    refuse_no_reward(model.directory, model.config.labels)
    chat = Chat(model.tokenizer)
    sequences = [rendered(chat, messages, f"conversations[{i}]") for i, messages in enumerate(conversations)]
    return score(model, sequences, batch_size=batch_size)[:, 0]


def rendered(chat: Chat, messages: Sequence[Message | dict[str, Any]], where: str) -> list[int]:
    """The ids of a conversation that ends with an answer. Raises UserError for one that training would not read either."""
    try:
        if not isinstance(messages, (list, tuple)):
            raise RowError(where, f"is {named(messages)}, must be a list of messages; put one conversation into a list")
        turns = [as_dict(m) if isinstance(m, Message) else m for m in messages]
        said = conversation(turns, where, {}, {}, silent=True)
        if said[-1].role != "assistant":
            raise RowError(where, "ends with no answer, which the reward would be of")
        chat.check_roles([as_dict(m) for m in said], None)
        return chat.tokenise(chat.render(said))[0]
    except RowError as e:
        raise UserError(f"rewards: {str(e).partition('; map it')[0]}") from e


def refuse_no_reward(of: Any, labels: Sequence[str]) -> None:
    """Raises UserError where these are not what a reward model's score head says."""
    if len(labels) != 1:
        has = f"one of {len(labels)} labels" if labels else "none"
        raise UserError(f"{of}: a reward model has a score head of one number, this has {has}")


def score(model: Model, sequences: Sequence[Sequence[int]], *, batch_size: int = 16) -> np.ndarray:
    """[n, C] float32: what the head makes of each sequence of tokens, none of them empty. Raises UserError for one too long."""
    limit = model.config.reach
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
