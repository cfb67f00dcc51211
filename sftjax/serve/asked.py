"""Request bodies of the OpenAI API, as what the engine is asked. Each field is read, or known to change no answer, or refused.

https://platform.openai.com/docs/api-reference/chat/create, .../completions/create; top_k, min_p, repetition_penalty and
chat_template_kwargs are those of vLLM's server.
"""

from __future__ import annotations

import difflib
import secrets
from dataclasses import dataclass
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.conversation import tools as read_tools
from sftjax.data.example import RowError
from sftjax.data.spans import REASONING
from sftjax.generate.ask import conversation_ids
from sftjax.generate.engine import Engine
from sftjax.generate.sampling import Sampling, choose

MOST = 128  # answers to one prompt, and alternatives to one token
TOGETHER = 1024  # answers to one request
LARGEST = 1e6  # of numbers
LONGEST = 1000  # characters of a stop string
SET_HERE = {  # what templates are rendered with, or what calls it, by these names
    *("self", "messages", "tools", "generate", "chat", "turns", "where", "conversations", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
}
SHORT = 16  # tokens of a completion that names no number, as in the API
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SHARED = {*SAMPLING, "model", "stream", "stream_options", "max_tokens", "seed", "stop", "n", "logprobs"}
CHAT = SHARED | {"messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
COMPLETION = SHARED | {"prompt", "echo"}
WITHOUT_EFFECT = {  # what callers note for themselves, or for a service that bills them
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
ONLY = {  # what is not there may be asked for in the one way that leaves answers as they are
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "suffix": ("",),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
}


class Refused(Exception):
    """What goes back in place of an answer. `param` is the field at fault."""

    def __init__(self, reason: str, param: str | None = None, status: int = 400):
        super().__init__(reason)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Asked:
    """One request's prompts, and how each is answered."""

    prompts: list[list[int]]
    max_new_tokens: list[int]  # by prompt; 0: only scored
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    n: int  # answers to each prompt
    stream: bool
    usage: bool  # of a stream: the tokens are told at its end
    top: int | None  # log-probs are told, and so many alternatives
    echo: bool  # the prompt stands before its answer

    @property
    def rows(self) -> list[list[int]]:
        """The prompt of each answer."""
        return [ids for ids in self.prompts for _ in range(self.n)]


@dataclass(frozen=True)
class Desk:
    """What requests are read with: the model's name, its engine and template, and how it samples where nothing is said."""

    name: str
    engine: Engine
    chat: Chat
    sampling: dict[str, float]

    def chatted(self, body: Any) -> Asked:
        """Of POST /v1/chat/completions. Raises Refused."""
        self.check(body, CHAT)
        longest = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        top = whole(body, "top_logprobs", 0, 0, MOST) if flag(body, "logprobs") else None
        if top is None and body.get("top_logprobs"):
            raise Refused("top_logprobs: needs logprobs, which is not asked for", "top_logprobs")
        return self.asked(body, [self.turns_ids(body)], whole(body, longest, self.engine.limit, 1), top, echo=False)

    def turns_ids(self, body: dict[str, Any]) -> list[int]:
        """The conversation up to where its answer begins, with the tools where it is given any."""
        turns, variables = body.get("messages"), body.get("chat_template_kwargs") or {}
        if not isinstance(turns, list):
            raise Refused("messages: needs a list of messages", "messages")
        turns = [remembered(turn, f"messages[{i}]") for i, turn in enumerate(turns)]
        if not self.chat.template:
            raise Refused(f"{self.name} has no chat template; ask /v1/completions", "messages")
        if not isinstance(variables, dict):
            raise Refused("chat_template_kwargs: needs an object", "chat_template_kwargs")
        if taken := SET_HERE & variables.keys():
            raise Refused(f"chat_template_kwargs: {min(taken)} is not for callers to set", "chat_template_kwargs")
        if body.get("tool_choice") not in (None, "auto", "none"):
            raise Refused("tool_choice: only auto and none are supported", "tool_choice")
        field = "messages"
        try:
            ids = conversation_ids(self.chat, turns, field, **variables)
            if not body.get("tools") or body.get("tool_choice") == "none":
                return ids
            field = "tools"
            told = conversation_ids(self.chat, turns, "messages", read_tools(body["tools"], field), **variables)
        except RowError as e:
            raise Refused(str(e), field) from None
        if told == ids:
            raise Refused(f"the template of {self.name} writes no tools; leave them out", "tools")
        return told

    def completed(self, body: Any) -> Asked:
        """Of POST /v1/completions. Raises Refused."""
        self.check(body, COMPLETION)
        prompts = [self.prompt_ids(prompt) for prompt in several(body.get("prompt"))]
        top = None if body.get("logprobs") is None else whole(body, "logprobs", 0, 0, MOST)
        echo = flag(body, "echo")
        return self.asked(body, prompts, whole(body, "max_tokens", SHORT, 0 if echo else 1), top, echo)

    def asked(self, body: dict[str, Any], prompts: list[list[int]], longest: int, top: int | None, echo: bool) -> Asked:
        limit = self.engine.limit
        for i, ids in enumerate(prompts):
            if not ids:
                raise Refused(f"prompt {i} is empty; a model needs at least one token to go on from", "prompt")
            if len(ids) + min(longest, 1) > limit:
                raise Refused(f"the prompt has {len(ids)} tokens; the model takes {limit}, with the answer", "prompt")
        stream = flag(body, "stream")
        if stream and top is not None:
            raise Refused("logprobs come with a whole answer; leave out stream", "logprobs")
        stop = () if body.get("stop") is None else body["stop"]
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
            raise Refused("stop: needs a text or a list of texts", "stop")
        if max(map(len, stop), default=0) > LONGEST:  # its beginnings are looked for at the end of every piece
            raise Refused(f"stop: needs texts of {LONGEST:,} characters at most", "stop")
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise Refused("stream_options: needs an object", "stream_options")
        n = whole(body, "n", 1, 1, MOST)
        if n * len(prompts) > TOGETHER:
            raise Refused(f"{n * len(prompts):,} answers: one request may ask for {TOGETHER:,}", "n")
        top_k = whole(body, "top_k", int(self.sampling["top_k"]), -1)
        numbers = {name: self.number(body, name) for name in SAMPLING if name != "top_k"}
        try:
            sampling = choose(top_k=min(max(top_k, 0), self.engine.model.config.vocab), **numbers)  # -1 is off, too
        except UserError as e:
            raise Refused(str(e), str(e).partition("=")[0]) from None
        return Asked(
            prompts,
            [min(longest, limit - len(ids)) for ids in prompts],
            sampling,
            seed=whole(body, "seed", secrets.randbits(32), 0, 2**32 - 1),
            stop=tuple(stop),
            n=n,
            stream=stream,
            usage=bool(options.get("include_usage")),
            top=top,
            echo=echo,
        )

    def check(self, body: Any, known: set[str]) -> None:
        """Raises Refused for what this model, or no model here, can do."""
        if not isinstance(body, dict):
            raise Refused("the body: needs a JSON object")
        if body.get("model") not in (None, self.name):
            raise Refused(f"model={body['model']}: there is no such model here, only {self.name}", "model", status=404)
        for name, value in body.items():
            if name in known or name in WITHOUT_EFFECT or value is None:
                continue
            if name not in ONLY:
                near = difflib.get_close_matches(name, known, n=1)
                raise Refused(f"{name}: no such field{f'; did you mean {near[0]}?' if near else ''}", name)
            if value not in ONLY[name]:
                raise Refused(f"{name}={value!r} is not supported; leave it out", name)

    def prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return [*self.chat.start_ids, *self.chat.tokenise(prompt)[0]]
        try:
            self.engine.know(0, prompt or [0])
        except UserError as e:
            raise Refused(str(e), "prompt") from None
        return prompt

    def number(self, body: dict[str, Any], name: str) -> float:
        value = body.get(name)
        if value is None:
            return self.sampling[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
            raise Refused(f"{name}={value!r}: needs a number", name)
        return value


def remembered(turn: Any, where: str) -> Any:
    """A turn whose thought comes back with it, and may be all of it; what is written of it is the template's to say. Raises
    Refused."""
    thoughts = {name: turn[name] for name in REASONING if turn.get(name) is not None} if isinstance(turn, dict) else {}
    for name, thought in thoughts.items():
        if not isinstance(thought, str):
            raise Refused(f"{where}.{name}: needs a text", "messages")
    silent = thoughts and turn.get("content") is None and not turn.get("tool_calls")
    return turn | {"content": ""} if silent else turn


def several(prompt: Any) -> list[Any]:
    """The prompts of a completion: a text, tokens, or a list of either."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt)):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(x, str) or tokens(x) for x in prompt):
        return prompt
    raise Refused("prompt: needs a text, a list of tokens, or a list of either", "prompt")


def tokens(x: Any) -> bool:
    return isinstance(x, list) and all(type(i) is int for i in x)


def flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise Refused(f"{name}={value!r}: needs true or false", name)
    return bool(value)


def whole(body: dict[str, Any], name: str, default: int, least: int, most: int | None = None) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or value < least or (most is not None and value > most):
        raise Refused(f"{name}={value!r}: needs a whole number from {least}" + ("" if most is None else f" to {most}"), name)
    return value
