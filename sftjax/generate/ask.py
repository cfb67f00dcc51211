"""sftjax.answer: a model that is open is asked, from Python.

model = sftjax.load("mine")
sftjax.answer(model, ["What is the capital of France?", [{"role": "system", "content": "Be brief."}, {"role": "user", ...}]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import Chat, as_dict
from sftjax.data.conversation import conversation, named
from sftjax.data.example import Message, RowError
from sftjax.generate.open import engine_of
from sftjax.hf.model import Model


def answer(model: Model, prompts: str | Sequence[Any], *, max_new_tokens: int = 512, **options: Any) -> list[str]:
    """The model's answer to each of `prompts`, in order, without the thought before it.

    A prompt is a text, which a user says through the model's own template, or a list of messages, up to the one that is
    answered. A model without a template goes on with a text, and takes no messages. `options` as in Engine.each: temperature
    and how else to sample (greedy by default), seed, stop_strings, batch_size. Ask all at once: an engine is made for every
    call. Raises UserError.
    """
    if model.config.labels:
        raise UserError(f"{model.directory}: ends with a score head, which generates no text")
    engine, chat = engine_of(model)
    asked = [ids(chat, prompt, f"prompts[{i}]") for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)]
    made = engine.generate(asked, max_new_tokens=max_new_tokens, tokenizer=model.tokenizer, **options)
    return [chat.said(one.text, one.ids) for one in made]


def ids(chat: Chat, prompt: Any, where: str) -> list[int]:
    """The tokens of a prompt up to where its answer begins. Raises UserError."""
    if isinstance(prompt, str) and not chat.template:
        return [*chat.start_ids, *chat.tokenise(prompt)[0]]
    try:
        if not isinstance(prompt, (str, list, tuple)):
            raise RowError(where, f"is {named(prompt)}, must be a text or a list of messages; put one conversation into a list")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return conversation_ids(chat, [as_dict(m) if isinstance(m, Message) else m for m in turns], where)
    except RowError as e:
        raise UserError(f"answer: {e}") from e


def conversation_ids(
    chat: Chat, turns: Any, where: str, tools: Sequence[dict[str, Any]] | None = None, **variables: Any
) -> list[int]:
    """The tokens of a conversation up to where its answer begins; `variables` go to the template. Raises RowError."""
    try:
        said = conversation(turns, where, {"developer": "system"}, {}, silent=True)
        if said[-1].role == "assistant":
            raise RowError(where, "ends with an answer, so nothing is asked")
        chat.check_roles([as_dict(m) for m in said], tools)
        return chat.prompt(said, tools, **variables)
    except RowError as e:  # without its advice on a config's keys: there is none here
        raise RowError(e.field, e.reason.partition("; map it")[0].partition("; choose one")[0]) from e
