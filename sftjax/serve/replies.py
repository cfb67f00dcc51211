"""What goes back over HTTP: answers, their pieces in a stream, and refusals, as the OpenAI API has them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from sftjax.generate.engine import Generated
from sftjax.generate.score import Scored

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Envelope:
    """What all that answers one request has in common."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return self._held("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage}

    def piece(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        """An event of a stream."""
        held = self._held("chat.completion.chunk" if self.chat else "text_completion", choices)
        return event(held | more)

    def choice(self, index: int, thought: str, text: str, finish: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """`thought` stands where DeepSeek's API and most servers have it; an answer that it leaves no room for is null."""
        apart = {"content": text or None, "reasoning_content": thought} if thought else {"content": text}
        said = {"message": {"role": "assistant"} | apart} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, thought: str, text: str, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        said = ({"role": "assistant"} if first else {}) | ({"reasoning_content": thought} if thought else {})
        said |= {"content": text} if text or first else {}
        return {"index": index, "delta": said, "logprobs": None, "finish_reason": finish}

    def _held(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}


def event(held: dict[str, Any]) -> str:
    return f"data: {json.dumps(held, ensure_ascii=False)}\n\n"


def finish(answer: Generated) -> str:
    return "stop" if answer.stopped else "length"


def usage(prompts: Iterable[Sequence[int]], answers: Iterable[Sequence[int]]) -> dict[str, int]:
    asked, made = sum(map(len, prompts)), sum(map(len, answers))
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def failed(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def chat_logprobs(tokenizer: Any, ids: Sequence[int], scored: Scored) -> dict[str, Any]:
    """`logprobs` of a chat's answer."""

    def one(token: int, logp: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, int(token)), "logprob": float(logp), "bytes": token_bytes(tokenizer, int(token))}

    rows = zip(ids, scored.logps, scored.top, scored.top_logps)
    return {"content": [one(i, logp) | {"top_logprobs": list(map(one, top, logps))} for i, logp, top, logps in rows]}


def token_text(tokenizer: Any, token: int) -> str:
    """A token's own text; decoding alone would take the first space from those of Llama 2's kind."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token) or ""  # none of a padded vocabulary's
    return " " + text if piece.startswith("\u2581") and not text.startswith(" ") else text


def token_bytes(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes of a token, which may be a part of a character; None where its tokenizer does not say."""
    text = token_text(tokenizer, token)
    if "\ufffd" not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return [int(fallback[1], 16)]
    known = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level vocabularies are written
    return [known[char] for char in piece] if set(piece) <= known.keys() else None


def text_logprobs(tokenizer: Any, ids: Sequence[int], scored: Scored) -> dict[str, Any]:
    """`logprobs` of a completion. Tokens that have none in front of them, the first of an echoed prompt, have no log-prob."""
    texts, unscored = [token_text(tokenizer, i) for i in ids], len(ids) - len(scored.logps)
    alternatives: list[dict[str, float] | None] = [None] * unscored
    for text, logp, top, logps in zip(texts[unscored:], scored.logps, scored.top, scored.top_logps):
        found: dict[str, float] = {}
        for token, alternative in zip(top, logps):
            found.setdefault(token_text(tokenizer, int(token)), float(alternative))  # of two that read alike the likelier
        alternatives.append(found if text in found else found | {text: float(logp)})
    offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=0))
    known = [None] * unscored + [float(logp) for logp in scored.logps]
    return {"tokens": texts, "token_logprobs": known, "top_logprobs": alternatives, "text_offset": offsets}
