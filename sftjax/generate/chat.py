"""`sftjax chat`: a conversation in the terminal, or line by line through a pipe.

The answer goes to stdout as it comes, everything else to stderr. A model without a chat template goes on with the text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Message, RowError
from sftjax.generate.engine import Engine
from sftjax.generate.open import open_engine
from sftjax.generate.text import Writer

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit or Ctrl-D leaves; Ctrl-C stops an answer"


def run_chat(
    model: str,
    *,
    adapter: str | None = None,
    quantize: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    **sampling: Any,
) -> None:
    """Talks until the input ends. `sampling` as in `generate.sampling.choose`."""
    engine, chat = open_engine(model, adapter, quantize)
    options = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    talk = Talk(engine, chat, system, tuple(stop_strings), options)
    note(HELP if chat.template else f"{model} has no chat template: it goes on with your text instead of answering. {HELP}")
    for line in read_lines():
        if line.startswith("/"):
            if talk.command(line):
                return
        elif line:
            talk.turn(line)


@dataclass
class Talk:
    """A conversation so far, and how to go on with it."""

    engine: Engine
    chat: Chat
    system: str | None
    stop_strings: tuple[str, ...]
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Obeys a line that starts with a slash; True to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return True
        if name == "/reset":
            self.messages = []
            note("the conversation starts anew")
        elif name == "/system":
            self.system, self.messages = rest.strip() or None, []
            note("the system prompt is set; the conversation starts anew" if self.system else "no system prompt")
        else:
            note(HELP)
        return False

    def turn(self, line: str) -> None:
        """Answers a line. One that cannot be answered is forgotten, and the reason said."""
        asked = [*self.messages, Message("user", line)]
        try:
            prompt = self.prompt(asked)
            if not self.engine.fits(prompt):
                reason = f"the conversation has {len(prompt)} tokens and the model takes {self.engine.limit}"
                raise UserError(f"{reason}; /reset starts anew")
            answer = self.answer(prompt)
        except (RowError, UserError) as e:
            note(str(e))
        else:
            self.messages = [*asked, Message("assistant", answer)] if self.chat.template else []

    def prompt(self, asked: list[Message]) -> list[int]:
        if not self.chat.template:
            return [*self.chat.start_ids, *self.chat.tokenise(asked[-1].content)[0]]
        return self.chat.prompt([Message("system", self.system), *asked] if self.system else asked)

    def answer(self, prompt: list[int]) -> str:
        """Prints the answer as it comes, and returns what it says: a template puts no thought of before into a prompt."""
        writer = Writer(self.chat.tokenizer, self.stop_strings, prompt)
        shown = 0
        ended = ""
        try:
            for token in self.engine.stream(prompt, **self.options):
                writer.add([token])
                print(writer.shown[shown:], end="", flush=True)
                shown = max(shown, len(writer.shown))
                if writer.stopped:
                    break
            else:
                room = min(self.options["max_new_tokens"], self.engine.limit - len(prompt))
                ended = f"cut off after {room} tokens" if len(writer.ids) == room else ""
        except KeyboardInterrupt:
            ended = "stopped"
        print(writer.text[shown:])
        if ended:
            note(ended)
        return self.chat.said(writer.text, writer.ids)


def read_lines() -> Iterator[str]:
    """Lines from the terminal or the pipe until it ends. Ctrl-C at the prompt asks again."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (arrows and history in input())
    while True:
        try:
            yield input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-D leaves")


def note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
