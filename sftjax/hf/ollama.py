"""The Modelfile beside a merged checkpoint, by which Ollama asks the model as its chat template does.

What a chat template writes between two messages depends, in most, on their roles alone. So conversations of marks are rendered,
cut at the marks, and a table of joints is all there is to know, which a Go template writes as well:

    ("", "user") <|im_start|>user\\n    ("user", "assistant") <|im_end|>\\n<|im_start|>assistant\\n    ...

Conversations of words then say whether it is so. Where it is not, there is no Modelfile; what else the chat template does, and
Ollama's will not, is told. The Modelfile is of a GGUF, which llama.cpp makes of every family: what Ollama imports by itself are
a few families for MLX, and those it asks in words of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import RowError
from sftjax.data.spans import FIRST, PROBE_TOOL, TAG, agree
from sftjax.hf.load import read_json

GGUF = "model.gguf"
CONVERTER = "llama.cpp/convert_hf_to_gguf.py"
MARKS = [chr(FIRST + i) for i in range(6)]
WORDS = ("Hello, {{ world }}!", "1 + 1 = 2\n\nor 3?", '"quoted" <b>text</b>', "第一 строка", "x", "Is it? It is.")
THOUGHT = "<think>\nIt is.\n</think>\n\n"
SAMPLING = {key: key for key in ("temperature", "top_k", "top_p", "min_p")} | {"repetition_penalty": "repeat_penalty"}
# What may not stand in a Go template or in a Modelfile's quotes: {{, three quotes, and all beyond ASCII that does not print
UNREADABLE = re.compile(r'\{\{+|\{\Z|"{3,}|[^\n\t -~]')

Turns = list[dict[str, Any]]


class Modelfile(NamedTuple):
    text: str
    bos: bool  # whether Ollama puts a BOS first by itself, as the tokenizer does: then TEMPLATE has none
    unlike: list[str]  # in what TEMPLATE is not the chat template, in words


class Joints(NamedTuple):
    """What stands between two messages, by their roles. "" is the start, and the answer that is asked for."""

    between: dict[tuple[str, str], str]
    closed: dict[str, str]  # how much of it closes the one before, whatever follows
    late: bool  # a system prompt stands before the last question, as in Mistral's templates

    def write(self, messages: Turns) -> str:
        """The conversation, up to where the model answers."""
        before, out = "", []
        for message in self.order(messages):
            out += [self.between[before, message["role"]], message["content"]]
            before = message["role"]
        return "".join(out) + self.between[before, ""]

    def order(self, messages: Turns) -> Turns:
        first, *rest = messages
        return [*rest[:-1], first, rest[-1]] if self.late and first["role"] == "system" else messages


def modelfile(chat: Chat, *, stop_ids: Sequence[int], sampling: Mapping[str, Any], system: str | None = None) -> Modelfile:
    """The Modelfile of a model that is asked through `chat`. Raises UserError where no Go template writes what its template does.

    stop_ids  end an answer
    sampling  generation_config.json
    system    a system prompt for conversations that have none
    """
    template, bos, unlike = "{{ .Prompt }}", bool(chat.start_ids), list[str]()
    if chat.template is not None:
        joints, unlike = derive(chat)
        token = chat.special_tokens["bos_token"] if bos else ""
        if not joints.between["", "user"].startswith(token):
            unlike.append("a BOS stands first")
        template = go_template(joints, token)
    lines = [f"# {GGUF}: python {CONVERTER} . --outfile {GGUF}"]
    if unlike:
        lines.append(f"# Asks as the model's chat template does, except that {', '.join(unlike)}")
    lines += [f"FROM ./{GGUF}", f"TEMPLATE {quoted(template)}"]
    if system is not None:
        lines.append(f"SYSTEM {quoted(system)}")
    stops = (chat.tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in stop_ids)
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in dict.fromkeys(stops) if stop]  # a padded vocabulary's ids have no text
    if sampling.get("do_sample"):
        lines += [f"PARAMETER {name} {x}" for key, name in SAMPLING.items() if isinstance(x := sampling.get(key), int | float)]
    return Modelfile("\n".join(lines) + "\n", bos, unlike)


def put(made: Modelfile, directory: Path) -> None:
    """The Modelfile into a checkpoint's directory, and into its tokenizer's config whether a BOS is added: where neither that nor
    tokenizer.json says so, the converter leaves it to llama.cpp's own view of the kind of tokenizer."""
    (directory / "Modelfile").write_text(made.text, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    held = read_json(file) if file.is_file() else {}
    file.write_text(json.dumps(held | {"add_bos_token": made.bos}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def derive(chat: Chat) -> tuple[Joints, list[str]]:
    """A chat template's joints, and how else what they write differs from it. Raises UserError where they are not all of it."""
    joints = measure(chat)
    system = ("system", "user") in joints.between
    for asked in (conversation(rounds, kind, WORDS) for rounds in (1, 2, 4) for kind in {False, system}):
        if joints.write(asked) != rendered(chat, asked):
            raise refusal("as what that writes depends on what the messages say")
    asked, edged = conversation(2, False, WORDS), conversation(2, False, [f" {word} \n" for word in WORDS])
    thought = [m | {"content": THOUGHT * (m["role"] == "assistant") + m["content"]} for m in asked]
    unlike = {
        "a system prompt is left out": not system,
        "tools are left out": rendered(chat, asked, [PROBE_TOOL]) != rendered(chat, asked),
        "earlier answers keep their thoughts": joints.write(thought) != rendered(chat, thought),
        "messages keep the white space at their ends": joints.write(edged) != rendered(chat, edged),
        f"the day stays {chat.day}": "strftime_now" in (chat.template or ""),
    }
    return joints, [what for what, holds in unlike.items() if holds]


def measure(chat: Chat) -> Joints:
    """The joints of conversations whose messages are marks. Raises UserError where two of the same roles differ."""
    joints = Joints({}, {}, False)
    for system, rounds in ((system, rounds) for system in (False, True) for rounds in (1, 2, 3)):
        asked = conversation(rounds, system, MARKS)
        text = rendered(chat, asked) or ""
        if system and MARKS[0] not in text:
            break  # it refuses system prompts, as Gemma's does, or drops them
        found = sorted(asked, key=lambda m: text.find(m["content"]))
        if system and rounds == 2:
            joints = joints._replace(late=found[0]["role"] == "user")
        if found != joints.order(asked) or any(text.count(m["content"]) != 1 for m in asked):
            raise refusal("as that refuses plain conversations, or leaves messages out, repeats or moves them")
        roles = ["", *(m["role"] for m in found), ""]
        for key, between in zip(pairwise(roles), re.split("|".join(m["content"] for m in asked), text)):
            if joints.between.setdefault(key, between) != between:
                raise refusal(f"as what that writes between {key[0] or 'the start'} and {key[1] or 'the answer'} varies")
    return joints._replace(closed=closed(chat, joints))


def closed(chat: Chat, joints: Joints) -> dict[str, str]:
    """How a message of each role ends, whatever follows: as it does where nothing is asked for after it, as far as tags agree."""
    out = {}
    for n, role in ((1, "user"), (2, "assistant")):
        end = (rendered(chat, conversation(2, False, MARKS)[:n], generate=False) or "").rpartition(MARKS[n - 1])[2]
        first, *others = (TAG.split(text) for text in (end, *(x for (a, _), x in joints.between.items() if a == role)))
        out[role] = "".join(first[: min(agree(first, other) for other in others)])
    question = joints.between["assistant", "user"].removeprefix(out["assistant"])
    after = "" if joints.late else joints.between.get(("system", "user"), "")
    return out | {"system": after.removesuffix(question)}


def rendered(chat: Chat, messages: Turns, tools: Any = None, generate: bool = True) -> str | None:
    """What the chat template writes; None where it refuses."""
    try:
        return chat.render(messages, tools, generate=generate)
    except RowError:
        return None


def conversation(rounds: int, system: bool, contents: Sequence[str]) -> Turns:
    """`rounds` questions, all but the last answered, after a system prompt or none."""
    roles = [*["system"] * system, *["user", "assistant"] * rounds][:-1]
    return [{"role": role, "content": contents[i % len(contents)]} for i, role in enumerate(roles)]


def refusal(why: str) -> UserError:
    return UserError(
        f"--to=ollama: Ollama's templates cannot write what the model's chat template does, {why}; use --to=hf, and "
        "llama.cpp's llama-server, which takes the chat template itself"
    )


def go_template(joints: Joints, bos: str) -> str:
    """The joints as a Go template over .Messages, without the BOS. It is one line, as another would be written too."""
    between = {(a, b): text if a else text.removeprefix(bos) for (a, b), text in joints.between.items()}
    rest = {(a, b): text.removeprefix(joints.closed.get(a, "")) for (a, b), text in between.items()}

    def opening(role: str) -> str:
        return by_role_before({a: text for (a, b), text in rest.items() if b == role and not (joints.late and a == "system")})

    def turn(role: str, opening: str) -> tuple[str, str]:
        return f'eq .Role "{role}"', opening + "{{ .Content }}" + literal(joints.closed[role])

    question, index = opening("user"), ""
    turns = [turn("assistant", opening("assistant"))]
    if joints.late:
        system = opening("system") + "{{ $.System }}" + literal(rest["system", "user"])
        question = choice([("and $.System (eq (len (slice $.Messages $i)) 1)", system)], question)
        index = "$i, $_ := "
    elif ("system", "user") in between:
        turns = [turn("system", opening("system")), *turns]
    body = choice([turn("user", question), *turns])
    known = ""
    if "$before" in body:
        known, role = '{{ $before := "" }}', "{{ $before = .Role }}"
        body += choice([('ne .Role "system"', role)]) if joints.late else role
    return f"{known}{{{{ range {index}.Messages }}}}{body}{{{{ end }}}}{literal(rest['user', ''])}"


def by_role_before(texts: Mapping[str, str]) -> str:
    """What stands before a message, by the role before it: where they differ a choice, then what all of them end with."""
    first, *others = texts.values()
    end = first[len(first) - min((agree(first[::-1], text[::-1]) for text in others), default=len(first)) :]
    heads = {role: text.removesuffix(end) for role, text in texts.items()}
    return choice([(f'eq $before "{role}"', literal(head)) for role, head in heads.items() if head]) + literal(end)


def choice(cases: Sequence[tuple[str, str]], otherwise: str = "") -> str:
    """The text of the first case whose condition holds, in Go."""
    if not cases:
        return otherwise
    ifs = "{{ else ".join(f"if {condition} }}}}{text}" for condition, text in cases)
    return "{{ " + ifs + ("{{ else }}" + otherwise) * bool(otherwise) + "{{ end }}"


def literal(text: str) -> str:
    """Text as a Go template in a Modelfile writes it: as it stands, but for what one of the two would not read as such."""

    def escaped(found: re.Match[str]) -> str:
        kept = found.group()[0] not in '{"' and found.group().isprintable()  # Ollama's parser drops what does not print
        return found.group() if kept else '{{ "' + "".join(f"\\U{ord(c):08x}" for c in found.group()) + '" }}'

    return UNREADABLE.sub(escaped, text)


def quoted(text: str) -> str:
    """A value in a Modelfile. Raises UserError for what none can hold."""
    if re.search(r'"""[^\S\n]*\n', text) or not all(c.isprintable() or c in "\n\t" for c in text):
        raise UserError(
            f"--to=ollama: no Modelfile can hold {text!r}, where a line ends with three quotes or something does not print; "
            "use --to=hf"
        )
    return f'"""{text}"""'
