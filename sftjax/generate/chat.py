"""`sftjax chat`: a conversation in the terminal, or line by line through a pipe.

The answer goes to stdout as it comes, everything else, the thought before it too, to stderr. A model without a chat template
goes on with the text.
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
from sftjax.generate.thought import Parts

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
        """Prints the thought and the answer as they come, and returns the answer: a template puts no thought of before into a
        prompt."""
        parts = Parts(self.chat, prompt, self.stop_strings, apart=self.chat.template is not None)
        shown, ended = ("", ""), ""
        try:
            for token in self.engine.stream(prompt, **self.options):
                parts.add([token])
                shown = tell(shown, parts.shown)
                if parts.writer.stopped:
                    break
            else:
                room = min(self.options["max_new_tokens"], self.engine.limit - len(prompt))
                ended = f"cut off after {room} tokens" if len(parts.writer.ids) == room else ""
        except KeyboardInterrupt:
            ended = "stopped"
        whole = parts.whole(not ended and not parts.writer.stopped)
        tell(shown, whole)
        print()
        if ended:
            note(ended)
        return whole[1]


def tell(before: tuple[str, str], now: tuple[str, str]) -> tuple[str, str]:
    """Prints what has come of (thought, answer) since `before`; the thought dim, where a terminal shows it."""
    thought, said = (new[len(old) :] for new, old in zip(now, before))
    if thought:
        print(f"\x1b[2m{thought}\x1b[0m" if sys.stderr.isatty() else thought, end="", file=sys.stderr, flush=True)
    if now[0] and said and not before[1]:
        print("\n", file=sys.stderr, flush=True)
    print(said, end="", flush=True)
    return now


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
