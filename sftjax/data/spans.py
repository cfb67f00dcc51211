"""Which characters of a rendered conversation each message became, whatever the template did to it.

The conversation is rendered a second time with every message's text between private-use characters ("marks"), which no
template knows. With the marks removed it must equal the true rendering, else it proves nothing; where they stand is where
each message landed, however the template trimmed it, cut its reasoning off or moved it.

A turn's span is what the model has to write there: from right after the text that `add_generation_prompt` puts before it
(so a `<think>` block that the template writes into the answer belongs to it), or, where the rendering does not have that text
there, from the content's first character; up to and including the turn's terminator, without the newline after. A template
that has no generation prompt leaves the header to the model, so there it is trained. Where a template has {% generation %}
markers, they say what a turn is, to the character.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from sftjax.data.example import RowError

Span = tuple[int, int]  # characters [start, end) of a rendering
Render = Callable[..., tuple[str, list[Span]]]  # (messages, tools, generate=False) -> text, {% generation %} spans

FIRST, LAST = 0x100000, 0x10FFFD  # Unicode plane 16, private use: in no tokenizer's vocabulary and in no sane text
MARK = re.compile("[\U00100000-\U0010fffd]")
TAG = re.compile(r"(<[^<>\s]{1,64}>|\[/?[A-Z_]{2,32}\])")  # templates look for these in content: marks stay beside them
REASONING = ("reasoning_content", "thinking", "reasoning")
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}
TURNS = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}] * 2
MARKED_PARTS = 200  # at each end of a text full of tags: what lies between never decides where a turn begins or ends
PROMPTS_KEPT = 4096  # distinct template texts between two messages: a handful, unless the template echoes the row


class Piece(NamedTuple):
    """A stretch of a message's text that got its own mark: `source[start:end]`."""

    message: int
    kind: str  # content | reasoning | call
    source: str
    start: int
    end: int


class Place(NamedTuple):
    """Where a message landed in the rendering. `before` and `after` bound what the template alone wrote around it."""

    first: Piece
    last: Piece
    kinds: frozenset[str]
    start: int
    end: int
    before: int
    after: int


class Marks:
    """Marks messages and remembers what each mark stands for."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        """A copy of `message` with every text in it marked, white space and tags outside the marks."""
        count = len(self.pieces)
        out = dict(message)
        for field in (*REASONING, "content"):
            value = message.get(field)
            if isinstance(value, str):
                out[field] = self.text(index, value, "content" if field == "content" else "reasoning")
            elif isinstance(value, (list, tuple)) and field == "content":
                out[field] = [
                    {**part, "text": self.text(index, part["text"], "content")}
                    if isinstance(part, dict) and isinstance(part.get("text"), str)
                    else part
                    for part in value
                ]
        if calls := message.get("tool_calls"):
            # not what templates compare or measure, nor, if there is more, the name, which some repeat with the tool's result
            out["tool_calls"] = self.strings(index, calls, ("type", "id", "name"))
            if len(self.pieces) == count:
                out["tool_calls"] = self.strings(index, calls, ("type", "id"))
        if len(self.pieces) == count and isinstance(out.get("content"), str):  # nothing but white space or tags
            content = out["content"]
            out["content"] = content + self.add(Piece(index, "content", content, len(content), len(content)))
        return out

    def text(self, index: int, text: str, kind: str) -> str:
        out, at = [], 0
        parts = TAG.split(text)
        for k, part in enumerate(parts):
            core = part.strip()
            if core and not k % 2 and (k < MARKED_PARTS or len(parts) - k < MARKED_PARTS):
                start = at + part.index(core)
                end = start + len(core)
                mark = self.add(Piece(index, kind, text, start, end))
                out += [text[at:start], mark, core, mark, text[end : at + len(part)]]
            else:
                out.append(part)
            at += len(part)
        return "".join(out)

    def strings(self, index: int, value: Any, skip: tuple[str, ...]) -> Any:
        """`value` with every string in it marked, but for those under the keys `skip`."""
        if isinstance(value, str):
            return self.text(index, value, "call")
        if isinstance(value, dict):
            return {k: v if k in skip else self.strings(index, v, skip) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.strings(index, v, skip) for v in value]
        return value

    def add(self, piece: Piece) -> str:
        self.pieces.append(piece)
        return chr(min(FIRST + len(self.pieces) - 1, LAST))  # beyond the plane's end `places` sees unequal pieces and refuses

    def places(self, marked: str, text: str) -> dict[int, Place] | None:
        """Every message's place in `text`, whose marked rendering is `marked`; None where the marks changed the rendering.

        A message that the template left out, or wrote in two places, has none.
        """
        if MARK.sub("", marked) != text or len(self.pieces) > LAST - FIRST:
            return None
        found = [(m.start() - k, ord(m.group()) - FIRST) for k, m in enumerate(MARK.finditer(marked))]
        count = Counter(mark for _, mark in found)
        runs = [list(run) for _, run in groupby(found, lambda at: self.pieces[at[1]].message)]
        out: dict[int, Place] = {}
        again: set[int] = set()
        for k, run in enumerate(runs):
            pieces = [self.pieces[mark] for _, mark in run]
            message = pieces[0].message
            if message in out or max(count[mark] for _, mark in run) > 2:
                again.add(message)
            before = runs[k - 1][-1][0] if k else 0
            after = runs[k + 1][0][0] if k + 1 < len(runs) else len(text)
            kinds = frozenset(piece.kind for piece in pieces)
            out[message] = Place(pieces[0], pieces[-1], kinds, run[0][0], run[-1][0], before, after)
        return {i: place for i, place in out.items() if i not in again}


class Turns:
    """Finds the turns of conversations in the renderings of one template."""

    def __init__(self, render: Render, special: Iterable[str], eos: str | None):
        self.render = render
        self.special = alternatives(special)
        self.prompts: dict[tuple[str, str, bool], tuple[int | None, int]] = {}
        closers, self.heads, self.before_thought, self.after_thought = self.probe()
        # GPT-OSS ends an answer with <|return|> and what goes on with <|end|>: a thought before it, or a turn before another
        self.last_closer = closers[-1] if closers else None
        self.closers = tuple(dict.fromkeys([*closers, *([eos] if eos else [])]))
        self.closer = alternatives(self.closers)

    def probe(self) -> tuple[list[str], list[str], str, str]:
        """What closes an answer before another turn and at the very end, what the template writes at the head of either, what
        opens a thought and what stands between it and an answer, seen on a conversation of our own."""
        for tools in (None, [PROBE_TOOL]):
            try:
                text, _ = self.render(TURNS, tools)
                places, _ = self.places(TURNS, tools, text, (1, 3))
                break
            except RowError:  # some templates are for conversations with tools only
                continue
        else:
            return [], [], "", ""
        closers, heads = [], []
        for i, place in sorted(places.items()):
            if TURNS[i]["role"] != "assistant":
                continue
            region = text[place.end : place.after].lstrip()
            if closer := self.special.match(region) or TAG.match(region):
                closers.append(closer.group())
            written = text[place.before : place.start]
            prompt, _ = self.prompt(TURNS, tools, i, written)
            heads.append(written[prompt:] if prompt is not None else "")
        return closers, heads, *self.probe_thought(tools)

    def probe_thought(self, tools: Any) -> tuple[str, str]:
        """What opens a thought, be it after the generation prompt or in it, and what stands between it and the answer; "" where
        the template writes no thoughts."""
        thought, answer = chr(FIRST), str(TURNS[-1]["content"])
        try:
            text, _ = self.render([*TURNS[:-1], TURNS[-1] | dict.fromkeys(REASONING, thought)], tools)
            prompt, _ = self.render(TURNS[:-1], tools, generate=True)
        except RowError:
            return "", ""
        before, _, after = text.rpartition(thought)
        if not before or answer not in after:
            return "", ""
        shared = agree(before, prompt)
        opened = before[shared:] or prompt[shared:] if shared == min(len(before), len(prompt)) else ""
        return opened, after.partition(answer)[0]

    def places(
        self, messages: list[dict[str, Any]], tools: Any, text: str, wanted: Collection[int]
    ) -> tuple[dict[int, Place], list[Span]]:
        """Where messages landed in their rendering `text`, and its {% generation %} spans. Raises RowError."""
        if MARK.search(text):
            raise RowError(
                "messages", "contains characters of Unicode's private plane 16 (U+100000 and up), which mark turns here"
            )
        answers = {*wanted, *(i for i, m in enumerate(messages) if m["role"] == "assistant")}
        for chosen in (range(len(messages)), answers):  # a template may test what users and tools wrote: leave that alone then
            marks = Marks()
            marked, spans = self.render([marks.message(i, m) if i in chosen else m for i, m in enumerate(messages)], tools)
            places = marks.places(marked, text)
            if places is not None:
                return places, [(unmarked(marked, a), unmarked(marked, b)) for a, b in spans]
        raise RowError("messages", "the chat template rewrites what the messages say, so their tokens cannot be told apart")

    def drops(self, messages: list[dict[str, Any]], tools: Any, role: str) -> bool:
        """Whether the template writes nothing of what `role` says in this conversation."""
        marks = Marks()
        try:
            marked, _ = self.render([marks.message(i, m) if m["role"] == role else m for i, m in enumerate(messages)], tools)
        except RowError:  # it looks at the text, so it knows the role
            return False
        return bool(marks.pieces) and not MARK.search(marked)

    def find(self, messages: list[dict[str, Any]], tools: Any, text: str, wanted: Collection[int]) -> dict[int, list[Span]]:
        """The spans of each wanted message in the conversation's rendering `text`. Raises RowError where they are not certain."""
        places, generated = self.places(messages, tools, text, wanted)
        out: dict[int, list[Span]] = {}
        for i, message in enumerate(messages):
            by_marker = generated and message["role"] == "assistant"  # the template itself says what is trained
            if i not in wanted and not by_marker:
                continue
            if i not in places:
                raise RowError(
                    f"messages[{i}]", "the chat template leaves it out or writes it twice, so its tokens cannot be told"
                )
            if message.get("tool_calls") and "call" not in places[i].kinds:
                raise RowError(f"messages[{i}].tool_calls", "the chat template does not write tool calls")
            if i in wanted:
                out[i] = [] if by_marker else [self.span(messages, tools, text, i, places)]
        for i, span in attribute(generated, places):
            if i in out:
                out[i].append(span)
        return out

    def span(self, messages: list[dict[str, Any]], tools: Any, text: str, i: int, places: dict[int, Place]) -> Span:
        """The span of message `i`, by the rule at the top of this file."""
        place = places[i]
        start = place.start - agree(place.first.source[: place.first.start][::-1], text[place.before : place.start][::-1])
        if messages[i]["role"] == "assistant":
            prompt, shared = self.prompt(messages, tools, i, text[place.before : place.start])
            if prompt is not None:
                start = place.before + prompt
            elif place.first.kind != "content":  # a reasoning block or a tool call, which the template opens in its own words
                if not shared:
                    raise RowError(
                        f"messages[{i}]", "the chat template opens this answer unlike any other, so its start is unknown"
                    )
                start = place.before + shared
        end = place.end + agree(place.last.source[place.last.end :], text[place.end : place.after])
        if closer := self.closer.search(text, end, place.after) or self.special.search(text, end, place.after):
            return start, closer.end()
        if any(p.start == place.after and messages[j]["role"] == messages[i]["role"] for j, p in places.items()):
            return start, place.after  # what joins two answers into one turn belongs to the first
        if place.last.kind == "call":
            raise RowError(
                f"messages[{i}]", "the chat template closes this tool call with no special token, so its end is unknown"
            )
        return start, end

    def prompt(self, messages: list[dict[str, Any]], tools: Any, i: int, written: str) -> tuple[int | None, int]:
        """How much of `written`, the template's text before answer `i`, is the generation prompt (None: it is not there), and
        how much they share beyond what closes the turn before."""
        key = (written, messages[i - 1]["role"] if i else "", bool(tools))
        if key not in self.prompts:
            if len(self.prompts) >= PROMPTS_KEPT:
                self.prompts.clear()
            self.prompts[key] = self.measure(messages[:i], tools, written)
        return self.prompts[key]

    def measure(self, before: list[dict[str, Any]], tools: Any, written: str) -> tuple[int | None, int]:
        marks = Marks()
        marked = [marks.message(j, m) for j, m in enumerate(before)]
        try:
            prompt = MARK.split(self.render(marked, tools, generate=True)[0])[-1]
            closed = MARK.split(self.render(marked, tools)[0])[-1]
        except RowError:  # the template wants something before an answer, or something else
            return None, 0
        if written.startswith(prompt):
            return len(prompt), len(prompt)
        parts = TAG.split(written)
        shared = sum(map(len, parts[: agree(parts, TAG.split(prompt))]))
        return None, shared if shared > agree(closed, prompt) else 0


def last_tag(head: str) -> str:
    """What an answer begins after, of what a template writes before it: from the last tag that no words stand before.

    <think>  </think>  ->  </think>        <|channel|>final<|message|>  ->  itself        all  ->  nothing
    """
    parts = TAG.split(head)
    starts = [k for k in range(1, len(parts), 2) if not parts[k - 1].strip()]
    return "".join(parts[starts[-1] :]).strip() if starts else ""


def attribute(generated: list[Span], places: dict[int, Place]) -> Iterator[tuple[int, Span]]:
    """Whose each {% generation %} span is: the message's that lies in it, or, if none does, the span's before."""
    owner = None
    for start, end in generated:
        owner = next((i for i, p in places.items() if start <= p.start and p.end <= end), owner)
        if owner is None:
            raise RowError("messages", "the chat template marks text as generated that belongs to no message")
        yield owner, (start, end)


def agree(a: Sequence[str], b: Sequence[str]) -> int:
    """How many elements `a` and `b` begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def unmarked(marked: str, at: int) -> int:
    """Position `at` of a marked rendering, in the rendering without marks."""
    return at - len(MARK.findall(marked, 0, at))


def alternatives(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `words`, the longest first; nothing where there are none. One pattern, in whatever order they come."""
    return re.compile("|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word)))) or "(?!)")
