"""Who is compared: a local model, with an adapter over it or not, or one behind an endpoint, by what --model says.

[NAME=]DIR            a Hugging Face directory or hub id
[NAME=]DIR@ADAPTER    a PEFT adapter over it
[NAME=]URL#MODEL      an OpenAI-compatible server
"""

from __future__ import annotations

import gc
import hashlib
import ipaddress
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Message, RowError
from sftjax.data.tokenizer import open_tokenizer
from sftjax.evaluate.endpoint import Endpoint, Reply, check_url
from sftjax.evaluate.prompts import Ask, plain
from sftjax.generate.open import open_engine
from sftjax.hf.load import resolve
from sftjax.hf.save import MORE_TEMPLATES
from sftjax.train.manifest import hash_tokenizer, hash_weights

# what changes an answer, beside weights, tokenizer and templates
FILES = ("generation_config.json", "chat_template.json")
NAMED = re.compile(r"([^/\\@=:#]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Contender:
    """One model. `url` and `model` are set of an endpoint, `path` of a local one."""

    name: str
    path: str = ""
    adapter: str | None = None
    url: str = ""
    model: str = ""


@dataclass(frozen=True)
class Options:
    """How every model answers: what a server and the engine both understand."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def telling(self) -> dict[str, Any]:
        """What an answer depends on: a greedy one not on the seed."""
        return asdict(self if self.temperature else replace(self, seed=0))


def parse(specs: Sequence[str]) -> list[Contender]:
    """The models of --model, given one or more times. Raises UserError."""
    found = [parse_one(spec) for spec in specs]
    for i, one in enumerate(found):
        if one.name in {other.name for other in found[:i]}:
            raise UserError(f"two models are called {one.name}; give --model={specs[i]} another name, --model=NAME=...")
    return found


def parse_one(spec: str) -> Contender:
    named = NAMED.fullmatch(spec)
    name, what = (named[1].strip(), named[2]) if named and not os.path.exists(spec) else ("", spec)
    if not what.strip():
        raise UserError(f"--model={spec}: needs a directory, a hub id, or an address as URL#MODEL")
    if re.match(r"https?://", what):
        url, model = check_url(what)
        return Contender(name or model.rpartition("/")[2] or model, url=url, model=model)
    path, at, adapter = (what, "", "") if os.path.isdir(os.path.expanduser(what)) else what.rpartition("@")
    if not at:
        path, adapter = what, ""
    elif not path or not adapter:
        raise UserError(f"--model={spec}: an adapter goes after its base, as --model=DIR@ADAPTER")
    parts = [os.path.basename(os.path.abspath(os.path.expanduser(p))) for p in (path, adapter) if p]
    return Contender(name or "+".join(parts), path=path, adapter=adapter or None)


class Local:
    """A model of ours. Its tokenizer is there from the start, its weights while it answers.

    `identity` is of what lies there, not where: an answer of other weights is another answer.
    """

    def __init__(self, contender: Contender, quantize: str | None, batch_size: int):
        self.contender, self.quantize, self.batch_size = contender, quantize, batch_size
        base = resolve(contender.path)
        beside = resolve(contender.adapter, needs="adapter_config.json") if contender.adapter else None
        self.chat = Chat(open_tokenizer(base, beside, False))
        hashes = [hash_folder(folder) for folder in (base, beside) if folder]
        decides = [*hashes, str(quantize), self.chat.template or "", self.chat.thought.pattern]
        self.identity = hashlib.sha256("\0".join(decides).encode()).hexdigest()
        self.notes = [] if self.chat.template else ["has no chat template: prompts are plain text"]

    def ids(self, ask: Ask) -> list[int]:
        """The prompt through the model's own template. Raises RowError where the template refuses it."""
        if ask.text is None and self.chat.template:
            return self.chat.prompt(ask.messages, ask.tools)
        text = ask.text if ask.text is not None else plain(ask.messages)
        return [*self.chat.start_ids, *self.chat.tokenise(text)[0]]

    def check(self, ask: Ask) -> None:
        self.ids(ask)

    def each(self, rounds: Sequence[tuple[str, Sequence[Ask]]], options: Options) -> Iterator[tuple[str, int, Reply]]:
        """(prompt's name, row, reply) as they come, a prompt after the other. Seconds are those since the reply before."""
        engine, _ = open_engine(self.contender.path, self.contender.adapter, self.quantize)
        for name, asks in rounds:
            prompts = [self.ids(ask) for ask in asks]
            fitting = [i for i, ids in enumerate(prompts) if engine.fits(ids)]
            for i in set(range(len(prompts))) - set(fitting):
                reason = f"the prompt has {len(prompts[i])} tokens; the model takes 1 to {engine.limit - 1}"
                yield name, i, Reply("", False, len(prompts[i]), 0, 0.0, refused=reason)
            start = time.perf_counter()
            for at, made in engine.each(
                [prompts[i] for i in fitting],
                max_new_tokens=options.max_new_tokens,
                stop_strings=options.stop,
                tokenizer=self.chat.tokenizer,
                seed=options.seed,
                batch_size=self.batch_size,
                temperature=options.temperature,
                top_p=options.top_p,
            ):
                i, now = fitting[at], time.perf_counter()
                text = self.chat.said(made.text, made.ids)
                yield name, i, Reply(text, made.stopped, len(prompts[i]), len(made.ids), now - start)
                start = time.perf_counter()
        del engine
        gc.collect()  # the next model gets its memory


def hash_folder(folder: Path) -> str:
    """Of the contents of all that answers depend on; weights are told apart as a run tells its base from another."""
    parts = [hash_weights(folder), hash_tokenizer(folder)]
    templates = sorted([*folder.glob("*.jinja"), *folder.glob(f"{MORE_TEMPLATES}/*.jinja")])
    for path in [*(folder / name for name in FILES), *templates]:
        if path.is_file():
            parts.append(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Remote:
    """A model behind an endpoint."""

    def __init__(self, contender: Contender, key_env: str | None, timeout: float, parallel: int):
        self.contender, self.timeout, self.parallel = contender, timeout, parallel
        self.key_env = key_env or ("OPENAI_API_KEY" if is_openai(contender.url) else None)
        self.key = os.environ.get(self.key_env, "").strip() or None if self.key_env else None
        if key_env and not self.key:
            raise UserError(f"--key-env={key_env}: there is no such variable in the environment, or nothing in it")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UserError(f"the key in {self.key_env} has characters in it that no key has; set it again")
        if self.key and not is_private(contender.url):
            raise UserError(f"--key-env={key_env}: {contender.url} would be sent the key unencrypted; give an https address")
        self.identity = f"{contender.url}#{contender.model}"
        self.reached = False  # an earlier run has answers of it
        self.notes: list[str] = []

    def check(self, ask: Ask) -> None:
        """A server says itself what it does not take."""

    def each(self, rounds: Sequence[tuple[str, Sequence[Ask]]], options: Options) -> Iterator[tuple[str, int, Reply]]:
        """(prompt's name, row, reply) as they come. Seconds are those of the one request."""
        endpoint = Endpoint(
            self.contender.url,
            self.contender.model,
            key=self.key,
            key_env=self.key_env,
            timeout=self.timeout,
            reached=self.reached,
            max_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p if options.top_p != 1 else None,
            stop=list(options.stop) or None,
            seed=options.seed if options.temperature else None,
        )
        for name, asks in rounds:
            for i, reply in endpoint.each([(turns(ask), ask.tools) for ask in asks], parallel=self.parallel):
                self.notes = endpoint.notes
                yield name, i, reply


def is_openai(url: str) -> bool:
    """Whether OpenAI's own key may go there unasked."""
    parts = urlsplit(url)
    return (parts.scheme, parts.hostname) == ("https", "api.openai.com")


def is_private(url: str) -> bool:
    """Whether nobody between here and there can read along: encrypted, or on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        return parts.scheme == "https" or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def turns(ask: Ask) -> Sequence[Any]:
    """Raw text as the user's turn: an endpoint of conversations knows nothing else."""
    return ask.messages if ask.text is None else (Message("user", ask.text),)


def check_asks(model: Local | Remote, rounds: Sequence[tuple[str, Sequence[Ask]]], where: Sequence[str]) -> None:
    """Raises UserError with the first row that a model's template refuses, before anything is paid for."""
    for name, asks in rounds:
        for ask, row in zip(asks, where):
            try:
                model.check(ask)
            except RowError as e:
                raise UserError(f"{row}: {model.contender.name} cannot be asked this with the prompt {name}: {e}") from e
