"""Turns in any dialect to Messages: role/content or from/value, text parts, tool calls and tools as templates want them.

What comes out is what Hugging Face templates are written for: content is a str or None, tool calls carry their
arguments as a dict, tools are JSON schemas under {"type": "function", "function": ...}, and no key is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sftjax.data.example import Message, RowError
from sftjax.data.read_json import loads

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),  # an assistant turn that is a call and no text
    "system": "system",
}
LOSS = ("loss", "loss_weight", "weight")  # ours, LLaMA-Factory's and OpenAI's name for a turn's own loss weight
MEDIA = (
    "image",
    "images",
    "image_url",
    "input_image",
    "audio",
    "audios",
    "audio_url",
    "input_audio",
    "video",
    "videos",
    "video_url",
)


def conversation(
    turns: Any, where: str, roles: Mapping[str, str], keys: Mapping[str, str], *, silent: bool = False
) -> tuple[Message, ...]:
    """The messages of `turns`. `keys` may name the keys that hold "role" and "content"; `silent`: an answer may say nothing.

    Raises RowError.
    """
    if turns is None:
        raise RowError(where, "is missing or null")
    turns = listed(turns, where)
    if not turns:
        raise RowError(where, "is empty: it has no turns")
    return tuple(_message(turn, f"{where}[{i}]", roles, keys, silent) for i, turn in enumerate(turns))


def check_answered(messages: tuple[Message, ...], where: str) -> None:
    """Raises RowError where nothing in `messages` could be an answer to train on."""
    if not any(m.role == "assistant" or m.loss for m in messages):
        said = ", ".join(dict.fromkeys(m.role for m in messages))
        raise RowError(where, f"has no assistant turn, so there is nothing to train on (roles: {said})")


def _message(turn: Any, where: str, roles: Mapping[str, str], keys: Mapping[str, str], silent: bool) -> Message:
    if not isinstance(turn, dict):
        raise RowError(where, f"is {named(turn)}, must be an object with a role and a content")
    turn = {key: part for key, part in turn.items() if part is not None}
    refuse_media(turn, where)
    role_key = _key(turn, keys.get("role"), ("role", "from"), where)
    found = (key for key in ("content", "value") if key in turn)
    content_key = keys.get("content") or next(found, "value" if role_key == "from" else "content")
    role = _role(text(turn.pop(role_key), f"{where}.{role_key}"), f"{where}.{role_key}", roles)
    loss = _loss(turn, where)
    content, field = turn.pop(content_key, None), f"{where}.{content_key}"
    if role == "function_call":
        return Message("assistant", None, loss, {"tool_calls": _calls(content, field)} | turn)
    content, extra = _parts(content, field) if isinstance(content, list) else (content, {})
    calls = [*extra.pop("tool_calls", []), *_own_calls(turn, where)]
    extra = turn | extra | ({"tool_calls": calls} if calls else {})
    if content is not None:
        text(content, field)
    elif not calls:
        raise RowError(field, "is missing or null")
    answer = role == "assistant" and loss != 0 and not silent
    if answer and not (calls or str(content).strip() or extra.get("reasoning_content")):
        raise RowError(field, "is an empty answer")
    return Message(role, content, loss, extra)


def _key(turn: dict[str, Any], own: str | None, usual: tuple[str, ...], where: str) -> str:
    found = next((key for key in ((own,) if own else usual) if key in turn), None)
    if found is None:
        raise RowError(
            where, f"has no {' or '.join((own,) if own else usual)}; its keys are {', '.join(map(str, turn)) or 'none'}"
        )
    return found


def _role(role: str, where: str, roles: Mapping[str, str]) -> str:
    known = roles.get(role) or ROLES.get(role)
    if known is None:
        raise RowError(
            where,
            f"{role!r} is not a role known here; map it with --config.data.roles.{role}=user, or pass it on to a "
            f"template that knows it with --config.data.roles.{role}={role}",
        )
    return known


def _loss(turn: dict[str, Any], where: str) -> float | None:
    found = {key: turn.pop(key) for key in LOSS if key in turn}
    if not found:
        return None
    key, weight = next(iter(found.items()))
    if not isinstance(weight, (bool, int, float)) or not math.isfinite(weight) or weight < 0:
        raise RowError(f"{where}.{key}", f"is {named(weight)}, must be true, false or a number from 0")
    return float(weight)


def _parts(parts: list[Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """Typed parts as one text, with what reasoning and tool calls there are apart from it."""
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        field = f"{where}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise RowError(field, f"is {named(part)}, must be an object with a type")
        part = {key: held for key, held in part.items() if held is not None}
        kind = part.get("type", "text")
        if kind in MEDIA:
            raise RowError(field, f"holds {kind}: only text is supported")
        held = part.get("text", part.get("value", part.get("content")))
        match kind:
            case "text" | "input_text" | "output_text":
                said.append(text(held, field))
            case "reasoning" | "thinking":
                thought.append(text(held if held is not None else part.get("thinking"), field))
            case "tool_call":
                calls += _calls(held, field)
            case _:
                raise RowError(field, f"has the type {kind!r}; known are text, reasoning and tool_call")
    extra: dict[str, Any] = {"reasoning_content": "".join(thought)} if thought else {}
    return "".join(said) if said or not calls else None, extra | ({"tool_calls": calls} if calls else {})


def _own_calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls under `tool_calls` or the older `function_call`, taken out of `turn`."""
    calls = []
    for key in ("tool_calls", "function_call"):
        if held := turn.pop(key, None):
            calls += _calls(held, f"{where}.{key}")
    return calls


def _calls(held: Any, where: str) -> list[dict[str, Any]]:
    held = parsed(held, where)
    calls = held if isinstance(held, list) else [held]
    if not calls:
        raise RowError(where, "holds no call")
    return [_call(parsed(call, where), where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """{"name", "arguments"} or {"function": {"name", "arguments"}}  ->  the latter, with the arguments as a dict."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(where, "is not a tool call: it needs a name and arguments")
    arguments = parsed(inner.get("arguments") or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"{where}.arguments", f"is {named(arguments)}, must be an object of named arguments")
    outer = {key: call[key] for key in ("id", "index") if call.get(key) is not None}
    return outer | {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def tools(held: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Tools as a list or its JSON, bare or wrapped  ->  each {"type": "function", "function": schema}; None for none."""
    out = []
    for i, tool in enumerate(listed(held, where)):
        tool = parsed(tool, f"{where}[{i}]")
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"{where}[{i}]", "is not a tool: it needs a name, a description and parameters")
        out.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(out) or None


def refuse_media(row: Mapping[str, Any], where: str) -> None:
    for key in MEDIA:
        if row.get(key):
            raise RowError(f"{where}.{key}" if where else key, "holds image, audio or video input: only text is supported")


def listed(held: Any, where: str) -> list[Any]:
    """A list, or the JSON of one (as a table holds it); nothing is the empty list."""
    if held is None or (isinstance(held, str) and not held.strip()):
        return []
    found = parsed(held, where)
    if not isinstance(found, list):
        raise RowError(where, f"is {named(found)}, must be a list")
    return found


def parsed(held: Any, where: str) -> Any:
    """`held`, or what it says where it is JSON text."""
    if not isinstance(held, str):
        return held
    try:
        return loads(held)
    except RowError as e:
        raise RowError(where, f"holds text that {e.reason}" if not e.field else f"holds text where {e}") from e


def text(held: Any, where: str) -> str:
    """`held` itself, which has to be text."""
    if isinstance(held, str):
        return held
    raise RowError(where, "is missing or null" if held is None else f"is {named(held)}, must be text{_quote(held)}")


def _quote(held: Any) -> str:
    return " (put it in quotes)" if isinstance(held, (bool, int, float)) else ""


def named(held: Any) -> str:
    """What a value is, in plain words and short."""
    match held:
        case None:
            return "null"
        case bool():
            return f"the truth value {str(held).lower()}"
        case int() | float():
            return f"the number {held}"
        case str():
            return f"the text {held[:40] + '...' if len(held) > 40 else held!r}"
        case list():
            return f"a list of {len(held)}"
        case dict():
            return "an object"
        case _:
            return f"a {type(held).__name__}"
