"""Example -> token ids and a loss weight per token, through the model's own chat template.

The conversation is rendered once and tokenised once; those are the ids that are trained, whatever the template did. Each
message that counts has its characters found in that rendering (data/spans.py) and its tokens through their offsets:

    a token that lies in a span is trained; a token that straddles a span's edge is trained if it has more than white space there.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftjax.config import UserError
from sftjax.data.example import Example, Message, RowError
from sftjax.data.spans import Span, Turns, alternatives, last_tag

# The special tokens of the built-in templates, which a base model has to be given
BUILT_IN = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
# Around thoughts that templates have no word of, as they leave them to the model or to who calls: Mistral's, Gemma's, Cohere's
THOUGHTS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
AFTER_THOUGHT = re.compile(rf"(?:{alternatives(THOUGHTS.values()).pattern})\s*")
DAY = datetime.date(2024, 7, 26)  # which Llama 3's templates name where there is no clock
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Encoded(NamedTuple):
    """One row: ids int32 [n], weights float32 [n] (what the loss counts this token as a target; the first is always 0)."""

    ids: np.ndarray
    weights: np.ndarray


class Chat:
    """A tokenizer and the chat template in force. Encodes rows, writes prompts; picklable.

    loss_on  answers: every assistant turn; last_answer: the last one; all: every token, the prompt's too.
             A message's own `loss` overrides it for that message's turn.
    day      what a template takes for today: rows are of one day, or they would be others tomorrow, and no run could be resumed
             or evaluated then. None is the day itself, for talk.
    """

    def __init__(self, tokenizer: Any, *, template: str | None = None, loss_on: str = "answers", day: datetime.date | None = DAY):
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.day = day
        self.templates = named_templates(tokenizer.chat_template if template is None else read_template(template))
        self.known_roles = {"user", "assistant"}
        self.special_tokens = dict(tokenizer.special_tokens_map)
        self.start_ids = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.turns = Turns(self.render_spans, special.values(), tokenizer.eos_token) if self.templates else None
        self.special = alternatives(special.values())
        self.special_ids = frozenset(special)
        closers = self.turns.closers if self.turns else ()
        self.closer_ids = self.single(closers)
        self.stop_ids = self.single(c for c in closers if self.turns and c == self.turns.last_closer)
        heads, after = (self.turns.heads, self.turns.after_thought) if self.turns else ([], "")
        self.ends = {*THOUGHTS.values(), *map(last_tag, heads), last_tag(after) or after.strip()} - {""}
        self.thought = re.compile(rf"(?:{alternatives(self.ends).pattern})\s*")
        self.heads = tuple(head for head in heads if head and not last_tag(head))
        self.openings = self.measure_openings()

    @property
    def template(self) -> str | None:
        """The template's text; None for a tokenizer that has none."""
        return self.templates.get("default")

    def single(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Those of `texts` that are one token, and the end of text."""
        ids = [self.tokenise(text)[0] for text in texts]
        return tuple(dict.fromkeys([one[0] for one in ids if len(one) == 1] + self.eos_ids))

    def said(self, text: str, ids: Sequence[int] | None = None) -> str:
        """What an answer says, without its thought and what else the template writes at an answer's head, which a tuned model
        writes too. A thought that never ends is all there is, and one that nothing has opened is none.

        `text` is what was generated as `ids`, whose special tokens it does not show; None of what a row says.
        """
        if ids is None:
            return self.thought.split(text)[-1] if self.thinks(text) else text
        raw = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not self.thought.search(raw) or not self.thinks(raw):
            return text.removeprefix(next((head for head in self.heads if text.startswith(head)), ""))
        rest = self.special.sub("", self.thought.split(raw)[-1])
        at = text.rfind(rest)  # the text may go on, up to a stop string in the midst of a token
        return text[at:] if at >= 0 else rest

    def thinks(self, raw: str) -> bool:
        """Whether an answer may begin with a thought: with what opens one, or what follows one, or within one."""
        return self.opened or raw.lstrip().startswith(tuple(self.openings))

    @functools.cached_property
    def opened(self) -> bool:
        """Whether the prompt has opened a thought before an answer begins, or there is no template to say that it has not."""
        try:
            asked = self.render([Message("user", "a")], generate=True) if self.template else ""
        except RowError:
            return True
        return not asked or asked.rstrip().endswith(tuple(opening for opening, thinks in self.openings.items() if thinks))

    def measure_openings(self) -> dict[str, bool]:
        """What an answer may begin with, or go on with where a thought of it ends: whether a thought follows."""
        opened, after, head = "", "", ""
        if self.turns:
            opened, after = self.turns.before_thought.strip(), self.turns.after_thought.strip()
            head = next((head for head in map(str.strip, self.turns.heads) if head and after.endswith(head)), "")
        out = dict.fromkeys((*THOUGHTS, opened), True) | dict.fromkeys((*self.ends, after, *map(str.lstrip, self.heads)), False)
        if turn := after.removesuffix(head) if head else "":  # GPT-OSS's thoughts and answers are messages, each with a head
            out |= {turn + opened: True, turn: False}
        return {opening: thinks for opening, thinks in out.items() if opening}

    def encode(self, example: Example) -> Encoded:
        """The row's ids and weights. Raises RowError."""
        if example.text is not None:
            ids = [*self.start_ids, *self.tokenise(example.text)[0], *self.eos_ids]
            return finish(ids, np.ones(len(ids), np.float32))
        if example.completion is not None:
            return self.encode_completion(*example.completion)
        if not example.messages:
            raise RowError("messages", "is empty")
        return self.encode_messages(example.messages, example.tools)

    def encode_completion(self, prompt: str, completion: str) -> Encoded:
        """The prompt's ids are those it has alone, as when the model is asked; the completion's are those it has after the
        prompt, or, where the two would merge into one token, those it has alone."""
        before = [*self.start_ids, *self.tokenise(prompt)[0]] if prompt else self.start_ids
        whole = [*self.start_ids, *self.tokenise(prompt + completion)[0]]
        after = whole[len(before) :] if whole[: len(before)] == before else self.tokenise(completion)[0]
        ids = [*before, *after, *self.eos_ids]
        weights = np.ones(len(ids), np.float32)
        if self.loss_on != "all":
            weights[: len(before)] = 0
        return finish(ids, weights)

    def encode_messages(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Encoded:
        turns = [as_dict(m) for m in messages]
        text, generated = self.render_spans(turns, tools)
        self.check_roles(turns, tools)
        ids, offsets = self.tokenise(text)
        wanted = self.wanted(messages)
        weights = np.full(len(ids), float(self.loss_on == "all"), np.float32)
        answers = {i for i, m in enumerate(messages) if m.role == "assistant"}
        if generated and wanted.keys() == answers and len(set(wanted.values())) == 1:
            weights[covered(text, offsets, generated)] = wanted[min(answers)]  # the template says it all: no second rendering
        elif wanted:
            assert self.turns is not None
            for i, spans in self.turns.find(turns, tools, text, wanted.keys()).items():
                weights[covered(text, offsets, spans)] = wanted.get(i, 0.0)
        return finish(ids, weights)

    def check_roles(self, turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> None:
        """Refuses a role that the template silently leaves out. Looked at in the first row that has it."""
        for i, turn in enumerate(turns):
            role = turn["role"]
            if role in self.known_roles:
                continue
            if self.turns and self.turns.drops(turns, tools, role):
                hint = f"map it with --config.data.roles.{role}=user, or choose a template that knows it"
                raise RowError(f"messages[{i}].role", f"the chat template writes nothing for the role {role!r}; {hint}")
            self.known_roles.add(role)

    def wanted(self, messages: Sequence[Message]) -> dict[int, float]:
        """The messages whose turns count otherwise than the rest of the row does, with their weights."""
        own = {i: float(m.loss) for i, m in enumerate(messages) if m.loss is not None}
        if self.loss_on == "all":
            return {i: w for i, w in own.items() if w != 1.0}
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if self.loss_on == "last_answer":
            answers = answers[-1:]
        return {i: w for i, w in sorted({**dict.fromkeys(answers, 1.0), **own}.items()) if w}

    def prompt(
        self, messages: Sequence[Message | dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """The ids up to where the assistant answers `messages`. `variables` go to the template, e.g. enable_thinking=False."""
        return self.tokenise(self.render(messages, tools, generate=True, **variables))[0]

    def ask(self, example: Example) -> list[int]:
        """The ids of a row up to where the answer that it ends with begins, or would begin. Raises RowError."""
        if example.messages is None:
            prompt = example.completion[0] if example.completion else example.text or ""
            return [*self.start_ids, *self.tokenise(prompt)[0]]
        if not example.asked():
            raise RowError("messages", "has nothing before the answer")
        return self.prompt(example.asked(), example.tools)

    def check(self, encoded: Encoded, example: Example) -> str | None:
        """Why training on this row would not do what its owner expects, in a sentence; None if it will."""
        trained = np.flatnonzero(encoded.weights)
        if not len(trained):
            return f"{example.source}:{example.line}: no token of this row is trained"
        last = ""
        for token in encoded.ids[trained][::-1].tolist():
            if token in self.closer_ids:
                return None
            last = self.tokenizer.decode([token])
            if last.strip():  # white space after the terminator does no harm
                break
        ends = ", ".join(self.tokenizer.convert_ids_to_tokens(list(self.closer_ids))) or "this tokenizer has none"
        return (
            f"{example.source}:{example.line}: the last trained token is {last!r}, not one that ends a turn ({ends}), "
            "so the model would not learn to stop here"
        )

    def render(
        self,
        messages: Sequence[Message | dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        generate: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the template writes it; with `generate`, up to where the assistant answers. Raises RowError."""
        return self.render_spans([as_dict(m) for m in messages], tools, generate, **variables)[0]

    def render_spans(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        generate: bool = False,
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """`render` and the characters between its {% generation %} markers, if the template has any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.templates.get("tool_use" if tools and "tool_use" in self.templates else "default")
        if template is None:
            raise RowError("messages", "this tokenizer has no chat template; choose one, e.g. --config.data.template=chatml")
        marked = GENERATION.search(template) is not None
        clock = stopped(self.day) if self.day and "strftime_now" in template else ""
        failure: Exception | None = None
        for variant in contents(messages):
            try:
                rendered: Any = render_jinja_template(
                    conversations=[variant],
                    tools=list(tools) if tools else None,
                    chat_template=clock + template,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=generate,
                    **{**self.special_tokens, **variables},
                )
            except Exception as e:  # a template is a program from elsewhere: it may fail in any way, at this row only
                failure = failure or e
                continue
            (text,), spans = rendered
            return text, spans[0] if marked else []
        raise RowError("messages", f"the chat template refuses this conversation: {failure}")

    def tokenise(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character offsets, with nothing added: a template writes its own BOS."""
        out = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return out["input_ids"], out["offset_mapping"]


def stopped(day: datetime.date) -> str:
    """Before a template: its clock, which is transformers' and takes no other, stands at this day."""
    said = "".join(f"|replace('%{d}', '{day.strftime('%' + d)}')" for d in (*"aAbBcdHIjmMpSUwWxXyY", "-d", "-m"))
    return "{% macro strftime_now(format) %}{{ format" + said + " }}{% endmacro %}\n"  # of which the newline is the tag's


def without_thought(text: str) -> str:
    """What an answer of any model says, as Chat.said has it of one whose template is known."""
    return AFTER_THOUGHT.split(text)[-1]


def as_dict(message: Message | dict[str, Any]) -> dict[str, Any]:
    """The message as templates see it."""
    if isinstance(message, dict):
        return message
    return {"role": message.role, "content": message.content, **message.extra}


def contents(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation in the ways a message without content (a pure tool call) may be given: most templates want the key
    absent, as transformers' apply_chat_template gives it, some none, some an empty text."""
    if all(m.get("content", "") is not None for m in messages):
        yield messages
        return
    yield [{k: v for k, v in m.items() if k != "content" or v is not None} for m in messages]
    yield messages
    yield [{**m, "content": ""} if m.get("content") is None else m for m in messages]


def covered(text: str, offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Which tokens are in `spans` of `text` [n], by the rule at the top of this file."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    out = np.zeros(len(starts), bool)
    for start, end in spans:
        touching = (starts < end) & (ends > start)
        for t in np.flatnonzero(touching & ((starts < start) | (ends > end))):
            touching[t] = not text[max(starts[t], start) : min(ends[t], end)].isspace()
        out |= touching
    return out


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before plain text of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def finish(ids: list[int], weights: np.ndarray) -> Encoded:
    if not ids:
        raise RowError("", "has no tokens at all")
    weights[0] = 0  # nothing comes before the first token to predict it from
    return Encoded(np.asarray(ids, np.int32), weights)


def read_template(template: str) -> str:
    """A template's text from a built-in name, a file, or itself. Raises UserError."""
    if template in BUILT_IN:
        return (resources.files("sftjax.data") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    if "{%" in template or "{{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "is not UTF-8 text"
        names = ", ".join(BUILT_IN)
        raise UserError(f"--config.data.template={template}: {reason}; give a .jinja file or one of {names}") from e


def named_templates(template: str | dict[str, str] | None) -> dict[str, str]:
    """Templates by name, each compiled once to see that it can be. Raises UserError."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    if templates and "default" not in templates:
        raise UserError(
            f"the tokenizer's chat templates are {', '.join(templates)}; choose one by file with --config.data.template"
        )
    for name, text in templates.items():
        try:
            render_jinja_template(conversations=[], chat_template=text)
        except TemplateError as e:
            raise UserError(f"chat template {name!r} is not valid Jinja: {e}") from e
    return templates


def prepare(tokenizer: Any, template: str | None = None, *, loss_on: str = "answers") -> tuple[Chat, list[str]]:
    """A Chat for training, and the tokens that had to be added to the tokenizer (in place) for it: embeddings must grow by them.

    `template` is a built-in name or a file; None is the tokenizer's own, or ChatML where it has none. The choice is written
    into the tokenizer, so that it is saved with it.
    """
    if template is None and not tokenizer.chat_template:
        template = "chatml"
    if template is None:
        return Chat(tokenizer, loss_on=loss_on), []
    text, new = read_template(template), []
    if template in BUILT_IN:
        known = tokenizer.get_vocab()
        new = [token for token in BUILT_IN[template] if token not in known]
        tokenizer.add_tokens(list(BUILT_IN[template]), special_tokens=True)
        if adds_bos(tokenizer):
            text = "{{- bos_token -}}\n" + text  # a base model that always saw its BOS goes on seeing it
    tokenizer.chat_template = text
    return Chat(tokenizer, loss_on=loss_on), new


def load_tokenizer(path: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a local directory or hub id, exactly as its tokenizer.json says. Raises UserError.

    transformers' AutoTokenizer would rebuild some (Phi-3's) from their vocabulary by the rules of a class, which gives other ids
    than the tokenizer.json that the model was trained with; it is used only where the checkpoint brings code of its own.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # on import it would advise to install torch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where = Path(path)
    local = where.is_dir()
    if local and not (where / "tokenizer.json").is_file() and not trust_remote_code:
        others = [f for f in ("tokenizer.model", "spiece.model", "vocab.json") if (where / f).is_file()]
        found = f"only {others[0]}; convert it once with transformers' AutoTokenizer(...).save_pretrained" if others else "none"
        raise UserError(f"{path}: needs a tokenizer.json, has {found}")
    kind = AutoTokenizer if trust_remote_code else PreTrainedTokenizerFast
    try:
        tokenizer = kind.from_pretrained(str(path), revision=revision or "main", trust_remote_code=trust_remote_code)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: its tokenizer files are damaged: {e}") from e
    except (OSError, ValueError) as e:
        if local:
            raise UserError(f"{path}: its tokenizer cannot be read: {str(e).strip().splitlines()[0]}") from e
        raise UserError(f"{path}: no such directory, and no hub id with a tokenizer.json that can be reached from here") from e
    except Exception as e:  # what the tokenizers library raises for a file it does not understand is a plain Exception
        raise UserError(f"{path}: its tokenizer.json cannot be read: {e}") from e
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json and cannot tell which characters a token stands for")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
