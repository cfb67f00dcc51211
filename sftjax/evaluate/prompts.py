"""Prompts to try: a file of variants, each a way to put the fields of a row to a model.

    plain: {}                                  the row as training reads it
    short: "Positive or negative? {review}"    a text alone is the input
    careful:
      system: You label hotel reviews.
      instruction: Answer positive or negative, nothing else.
      input: "Review: {review}"                by itself it is the row's own question
      examples:                                turns before the question, through the same instruction and input
        - {review: The bed was soft., output: positive}
      labels: {1: positive, 0: negative}       what this prompt calls the answers of the file

{name} is a field of the row; dots lead inside; {{name}} is {name} itself, and other braces are what they are. The file is
YAML, or JSON by its name.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import without_thought
from sftjax.data.example import Example, Message, RowError, split
from sftjax.data.layouts import pick

PARTS = ("system", "instruction", "input", "examples", "labels")
FIELD = re.compile(r"\{\{([\w.\-]+)\}\}|\{([\w.\-]+)\}")


@dataclass(frozen=True)
class Variant:
    """One prompt. With nothing but a name it asks the row as training reads it."""

    name: str
    system: str | None = None
    instruction: str | None = None
    input: str | None = None
    examples: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, str] | None = None

    @property
    def fields(self) -> list[str]:
        """The fields of a row that it names."""
        texts = [text for text in (self.system, self.instruction, self.input) if text]
        return list(dict.fromkeys(m[2] for text in texts for m in FIELD.finditer(text) if m[2]))

    def expected(self, answer: str) -> str:
        """What this prompt calls the file's answer. Raises RowError for one that its labels leave out."""
        if self.labels is None:
            return answer
        if answer.strip() not in self.labels:
            raise RowError("", f"the answer {answer.strip()!r} is not among the labels of the prompt {self.name}")
        return self.labels[answer.strip()]


@dataclass(frozen=True)
class Ask:
    """What a model is asked: turns, or raw text to go on from; and the answer that is right."""

    messages: tuple[Message, ...]
    text: str | None
    expected: str
    tools: tuple[dict[str, Any], ...] | None = None


def ask(variant: Variant, fields: Mapping[str, Any], example: Example | None, answer: str) -> Ask:
    """A row through a prompt. `example` is the row as training reads it, for what the prompt leaves to it. Raises RowError."""
    expected = variant.expected(answer)
    tools = example.tools if example else None
    own = asked(example) if example else ()
    if isinstance(own, str) and not (variant.system or variant.instruction or variant.input or variant.examples):
        return Ask((), own, expected, tools)
    turns = (Message("user", own),) if isinstance(own, str) else own
    *before, last = turns or (Message("user", ""),)
    system = [m for m in before if m.role == "system"]
    if variant.system is not None:
        system = [Message("system", put(variant.system, fields))]
    if variant.input is not None:
        before = []
        last = Message("user", join(variant.instruction, variant.input, fields))
    elif variant.instruction is not None:
        if last.role != "user" or not isinstance(last.content, str):
            raise RowError("messages", f"does not end with a user's text, which the prompt {variant.name} has an instruction for")
        last = Message("user", f"{put(variant.instruction, fields)}\n{last.content}")
    shots = [turn for shot in variant.examples for turn in turns_of(variant, shot)]
    return Ask((*system, *shots, *(m for m in before if m.role != "system"), last), None, expected, tools)


def turns_of(variant: Variant, shot: Mapping[str, str]) -> tuple[Message, Message]:
    """An example's question and answer."""
    question = join(variant.instruction, variant.input or "{input}", shot)
    return Message("user", question), Message("assistant", shot["output"])


def join(instruction: str | None, input: str, fields: Mapping[str, Any]) -> str:
    return "\n".join(put(part, fields) for part in (instruction, input) if part)


def put(template: str, fields: Mapping[str, Any]) -> str:
    """The fields in their places, in one pass: a field whose text says {name} is left alone."""
    return FIELD.sub(lambda m: f"{{{m[1]}}}" if m[1] else shown(pick(fields, m[2])), template)


def shown(value: Any) -> str:
    """A field as text; nothing where the row has none, JSON of a list or an object."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with a gap comes as floats
    return json.dumps(value, ensure_ascii=False)


def asked(example: Example) -> tuple[Message, ...] | str:
    """The row without the answer it ends with: turns, or raw text. Raises RowError where it asks nothing."""
    if example.text is not None:
        raise RowError("text", "is plain text, which asks nothing; say what to ask with a prompt's input")
    return split(example)[0]


def answer_of(example: Example) -> str:
    """The answer that the row ends with, but for its thought. Raises RowError where there is none to compare with."""
    answer = split(example)[1]
    if answer is None:
        raise RowError("", "has no answer to compare with; name the field that holds it with --expected=FIELD")
    return without_thought(answer)


def plain(messages: Sequence[Message]) -> str:
    """Turns as text, for a model without a chat template: an answer after a space, a blank line between turns of asking.

    The way of lm-evaluation-harness (target_delimiter, fewshot_delimiter), so that a prompt may end with "Answer:".
    """
    text = ""
    for m in messages:
        said = shown(m.content)
        if m.role == "assistant":
            text += ("" if text.endswith((" ", "\n")) else " ") + said
        else:
            text += ("\n\n" if text else "") + said
    return text


def read_variants(path: str) -> list[Variant]:
    """The prompts of a file, in its order. Raises UserError."""
    import yaml

    where = f"--prompts={path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        # BaseLoader: every value is text, so that `1: yes` is no boolean
        held = json.loads(text, object_pairs_hook=pairs) if path.lower().endswith(".json") else yaml.load(text, Loader=loader())
    except OSError as e:
        raise UserError(f"{where}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: is not UTF-8 text") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: is not JSON: {e.msg}") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: is not YAML: {getattr(e, 'problem', None) or e}; text with a colon or braces needs quotes"
        ) from e
    except Twice as e:
        raise UserError(f"{where}: {e} is there twice; every name needs to be another") from e
    if not isinstance(held, dict) or not held:
        raise UserError(f'{where}: needs names of prompts with their parts, such as\n  short:\n    input: "Label this: {{text}}"')
    return [variant(str(name), parts, where) for name, parts in held.items()]


def variant(name: str, parts: Any, where: str) -> Variant:
    """One prompt of the file. Raises UserError."""
    here = f"{where}: {name}"
    if isinstance(parts, str) or parts is None:
        parts = {"input": parts} if parts else {}
    if not isinstance(parts, dict):
        raise UserError(f"{here}: needs parts, {', '.join(PARTS)}, or a text, which is the input")
    for key in parts:
        if key not in PARTS:
            if parts[key] in ("", None):
                raise UserError(f'{here}: {{{key}}} without quotes is YAML\'s own; write "{{{key}}}"')
            near = difflib.get_close_matches(key, PARTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PARTS)}"
            raise UserError(f"{here}.{key}: no such part; {hint}")
    words = {key: words_of(parts[key], f"{here}.{key}") for key in PARTS[:3] if key in parts}
    question = words.get("instruction", "") + words.get("input", "{input}")
    shots = tuple(example_of(e, f"{here}.examples[{i}]", question) for i, e in enumerate(list_of(parts.get("examples"), here)))
    labels = parts.get("labels")
    if labels is not None and not (isinstance(labels, dict) and labels):
        raise UserError(
            f"{here}.labels: needs the file's answers and what this prompt calls them, e.g. {{0: negative, 1: positive}}"
        )
    return Variant(name, **words, examples=shots, labels={str(k): shown(v) for k, v in labels.items()} if labels else None)


def words_of(value: Any, where: str) -> str:
    if isinstance(value, dict) and len(value) == 1 and not any(value.values()):
        raise UserError(f'{where}: {{{next(iter(value))}}} without quotes is YAML\'s own; write "{{{next(iter(value))}}}"')
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: needs a text; leave the part out to have none")
    return value.removesuffix("\n")  # a YAML block ends with one


def list_of(value: Any, where: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise UserError(f"{where}.examples: needs a list, each with the fields of a question and its output")
    return value or []


def example_of(shot: Any, where: str, question: str) -> dict[str, str]:
    needs = [*dict.fromkeys(m[2] for m in FIELD.finditer(question) if m[2]), "output"]
    if not isinstance(shot, dict):
        raise UserError(f"{where}: needs {', '.join(needs)}")
    if missing := [key for key in needs if pick(shot, key) in ("", None)]:
        raise UserError(f"{where}: has no {missing[0]}; an example needs {', '.join(needs)}")
    return {str(key): shown(value) for key, value in shot.items()}


class Twice(ValueError):
    """A key that is there twice, of which the first would be lost."""


def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in items]
    if again := next((key for key in keys if keys.count(key) > 1), None):
        raise Twice(again)
    return dict(items)


def loader() -> Any:
    import yaml

    class Loader(yaml.BaseLoader):
        pass

    def mapping(self: Any, node: Any) -> Any:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "braces without quotes", key.start_mark)
        return pairs([(self.construct_object(k), self.construct_object(v, deep=True)) for k, v in node.value])

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader
