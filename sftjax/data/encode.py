"""Examples to encoded rows through a Chat, in order, on one core or on all of them.

A preference's answers are each encoded once, with their prompt, as supervised fine-tuning would encode them; a row is the
answers that are compared (data/pairs.py), end to end.

Small data is encoded right here: nothing beats not starting anything. When that has taken a few seconds and there is more,
worker processes take over. They are this module run as a program (`python -m sftjax.data.encode`), which takes a Chat and
then chunks of examples from its stdin: multiprocessing would import the caller's main script again, or fork under jax.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np

from sftjax.config import UserError
from sftjax.data.cache import Row, content_key, dumps
from sftjax.data.chat import Chat, Encoded, finish
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected
from sftjax.data.pairs import sides

CHUNK = 256  # examples handed to a worker at once ...
CHUNK_CHARACTERS = 4_000_000  # ... and what they may hold together
LIMIT = 4_000_000  # characters of a row: tokenizers need some 250 bytes of memory for each, and no model's context is as long
PART = 1_000_000  # plain text may be longer: it is tokenised in parts of this many characters
PATIENCE = 4.0  # seconds of encoding here before workers are started, about what starting them costs

Items = list[Example | Rejected]
Done = list[Row | Rejected]


def encode(
    items: Iterator[Example | Rejected], chat: Chat, workers: int | None, say: Callable[[str], None], want: str = "answers"
) -> Iterator[Row | Rejected]:
    """Each item encoded, in order; a row the template cannot render becomes a Rejected. `workers` None: as is quickest.

    A ranking makes a row of each of its pairs where `want` is "pairs", one where it is "rankings".
    """
    chunks = chunked(items)
    count = workers or cores()
    spent = 0.0
    while count == 1 or (workers is None and spent < PATIENCE):
        if (chunk := next(chunks, None)) is None:
            return
        started = time.perf_counter()
        rows = encode_all(chat, chunk, want)
        spent += time.perf_counter() - started
        yield from rows
    if first := next(chunks, None):
        say(f"tokenising in {count} processes")
        with Pool(count, chat, want) as pool:
            for rows in pool.map(chain([first], chunks)):
                yield from rows


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(chat: Chat, items: Items, want: str) -> Done:
    return list(chain.from_iterable([item] if isinstance(item, Rejected) else encode_one(chat, item, want) for item in items))


def encode_one(chat: Chat, example: Example, want: str = "answers") -> Done:
    """The rows of an example: one, but for rankings of which pairs are wanted."""
    encoded: list[Encoded] = []
    try:
        if (example.text is None or example.answers) and (size := characters(example)) > LIMIT:
            raise RowError("", f"has {size:,} characters; a conversation of more than {LIMIT:,} is not tokenised")
        for alone in example.alone():
            if want == "prompts":
                encoded.append(question(chat, alone))
            else:
                encoded.append(chat.encode(alone) if not long(alone) else encode_long(chat, alone.text or ""))
    except RowError as e:
        reason = f"with answer {len(encoded) + 1}, {e.reason}" if len(example.answers or ()) > 1 else e.reason
        return [Rejected(example.source, example.line, e.field, reason)]
    key, prompt = keys(example, want == "prompts")
    if want == "prompts":
        ids, weights = encoded[0]
        place = example.source, example.line
        return [Row(*place, key, prompt, True, False, ids, weights, [(len(ids), 1)], dumps(example))]
    terminated = [chat.check(part, example) is None for part in encoded]

    def joined(slots: Mapping[int, int], example: Example, tied: bool = False) -> Row:
        ids, weights = (np.concatenate(columns) for columns in zip(*(encoded[k] for k in slots)))
        parts = [(len(encoded[k].ids), slot) for k, slot in slots.items()]
        ends = all(terminated[k] for k in slots)
        return Row(example.source, example.line, key, prompt, ends, tied, ids, weights, parts, dumps(example))

    if example.answers is None:
        return [joined({0: 1}, example)]
    answers = example.answers
    rows: Done = [joined(slots, replace(example, answers=tuple(answers[k] for k in slots))) for slots in sides(answers, want)]
    return rows or [joined({k: k + 1 for k in range(len(answers))}, example, tied=True)]


def question(chat: Chat, example: Example) -> Encoded:
    """What the row asks, of which nothing is trained."""
    ids = chat.ask(example)
    return finish(ids, np.zeros(len(ids), np.float32))


def keys(example: Example, asks: bool) -> tuple[int, int]:
    """64 bits each of the hashes of what the row says and of what rows like it are split by: their prompts, where they are
    preferences or only ask; else the same."""
    key = content_key(example)
    if asks:
        return key, prompt_key(example)
    return key, key if example.answers is None else content_key(replace(example, answers=None))


def prompt_key(example: Example) -> int:
    """64 bits of a hash of what the row asks, whatever it answers."""
    asks = replace(example, messages=example.asked()) if example.messages else example
    return content_key(replace(asks, completion=(asks.completion[0], "")) if asks.completion else asks)


def chunked(items: Iterator[Example | Rejected]) -> Iterator[Items]:
    """Items in lists that are neither long nor heavy."""
    chunk: Items = []
    size = 0
    for item in items:
        chunk.append(item)
        size += characters(item) if isinstance(item, Example) else 0
        if len(chunk) == CHUNK or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def characters(example: Example) -> int:
    """The length of what the example says; the prompt counts with every answer."""
    if example.answers is not None:
        return sum(map(characters, example.alone()))
    said = [m.content for m in example.messages or ()] + list(example.completion or ()) + [example.text]
    return sum(len(text) for text in said if isinstance(text, str))


def long(example: Example) -> bool:
    """Whether this is plain text to be tokenised in parts."""
    return example.text is not None and characters(example) > PART


def encode_long(chat: Chat, text: str) -> Encoded:
    """A document in parts that end with a line or before a space, where hardly any tokenizer would join what is cut."""
    ids, at = list(chat.start_ids), 0
    while at < len(text):
        end = at + PART
        if end < len(text):
            cut = text.rfind("\n", at + PART // 2, end) + 1 or text.rfind(" ", at + PART // 2, end)
            end = cut if cut > 0 else end
        ids += chat.tokenise(text[at:end])[0]
        at = end
    ids += chat.eos_ids
    return finish(ids, np.ones(len(ids), np.float32))


class Pool:
    """`count` workers and a thread for each, which waits for it."""

    def __init__(self, count: int, chat: Chat, want: str):
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        pickled = pickle.dumps((chat, want), pickle.HIGHEST_PROTOCOL)
        self.workers = [Worker(pickled) for _ in range(count)]
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()  # which ends the wait of its thread
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.process.communicate()  # closes the pipes, whatever stands in them
            worker.log.close()

    def map(self, chunks: Iterator[Items]) -> Iterator[Done]:
        """The encoded chunks in order; a few more than there are workers are under way, so memory stays bounded."""
        pending: deque[Future[Done]] = deque()
        for chunk in chunks:
            pending.append(self.threads.submit(self.encode, chunk))
            if len(pending) > 3 * len(self.workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def encode(self, chunk: Items) -> Done:
        worker = self.idle.get()
        try:
            return worker.encode(chunk)
        finally:
            self.idle.put(worker)


class Worker:
    """A process that encodes what it is sent."""

    def __init__(self, greeting: bytes):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.greeting = greeting  # sent with the first chunk: by then the process listens, and nobody waits for it to start
        # sys.path: the worker must find what this process found, a notebook's additions and remote code too
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sftjax.data.encode"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=env
        )

    def encode(self, chunk: Items) -> Done:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(self.greeting + pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL))
            self.process.stdin.flush()
            self.greeting = b""
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as e:  # the last: it ended within an answer
            self.log.seek(0)
            said = self.log.read().decode("utf-8", "replace").strip()[-2000:]
            code = self.process.wait()
            ended, told = (f"ended with {code}", f": {said}") if code != -9 else ("was killed, maybe for want of memory", "")
            raise UserError(f"a tokenising process {ended}; --config.data.workers=1 does without{told}") from e


def main() -> None:
    """The worker: stdin a Chat and what is wanted, then chunks; stdout their encoded rows. Ends with its stdin."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the stream of rows
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type] # transformers would import it, 2 s and 450 MiB for nothing
    chat, want = pickle.load(sys.stdin.buffer)
    while True:
        try:
            items = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(encode_all(chat, items, want), out, pickle.HIGHEST_PROTOCOL)
        out.flush()


if __name__ == "__main__":
    main()
