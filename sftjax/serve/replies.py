"""What goes back over HTTP: answers, their pieces in a stream, and refusals, as the OpenAI API has them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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

    def choice(self, index: int, text: str, finish: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, text: str, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        said = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
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
        text = tokenizer.decode([token])
        return {"token": text, "logprob": float(logp), "bytes": list(text.encode())}

    rows = zip(ids, scored.logps, scored.top, scored.top_logps)
    return {"content": [one(i, logp) | {"top_logprobs": list(map(one, top, logps))} for i, logp, top, logps in rows]}


def text_logprobs(tokenizer: Any, ids: Sequence[int], scored: Scored) -> dict[str, Any]:
    """`logprobs` of a completion. Tokens that have none in front of them, the first of an echoed prompt, have no log-prob."""
    texts, unscored = [tokenizer.decode([i]) for i in ids], len(ids) - len(scored.logps)
    alternatives: list[dict[str, float] | None] = [None] * unscored
    for text, logp, top, logps in zip(texts[unscored:], scored.logps, scored.top, scored.top_logps):
        found: dict[str, float] = {}
        for token, alternative in zip(top, logps):
            found.setdefault(tokenizer.decode([token]), float(alternative))  # of two that read alike the likelier
        alternatives.append(found if text in found else found | {text: float(logp)})
    offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=0))
    known = [None] * unscored + [float(logp) for logp in scored.logps]
    return {"tokens": texts, "token_logprobs": known, "top_logprobs": alternatives, "text_offset": offsets}
