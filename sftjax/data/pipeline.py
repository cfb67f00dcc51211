"""From config.data to three lists of rows ready to train on, with every row that was read accounted for.

    files -> Examples -> encoded rows (a Store, cached by content) -> kept or dropped (the Ledger) -> train, eval, test (Rows)

A task learns from answers, from pairs, from rankings or from answers with a label; a source that holds something else is
refused. A store holds every usable row of its source; what follows is arithmetic on lengths and hashes, so another max_length,
split or weight tokenises nothing again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.data import cache
from sftjax.data.cache import Store
from sftjax.data.chat import Chat
from sftjax.data.encode import encode
from sftjax.data.formats import Rejected, counted, fail_on, read_examples
from sftjax.data.ledger import KEPT, Ledger
from sftjax.data.lines import open_bytes
from sftjax.data.readers import kind, read, resolve
from sftjax.data.rows import Rows, parted
from sftjax.data.sources import Source, sources

Say = Callable[[str], None]
WANTS = {"dpo": "pairs", "reward": "pairs", "kto": "labels", "grpo": "prompts", "ppo": "prompts"}  # the others: answers


def wanted(config: ConfigDict) -> str:
    """What the task learns from: answers, pairs, rankings, labels (good or bad), classes (a text and its label) or prompts."""
    if config.task == "classify" and config.classify.by == "head":
        return "classes"
    if config.task == "reward" and config.reward.loss == "plackett_luce":
        return "rankings"
    return WANTS.get(config.task, "answers")


@dataclass(frozen=True)
class Splits:
    """train, eval and test rows, and for the manifest the report: counts of rows by what became of them, hashes of the data.

    report = {"read", "kept", "dropped": {reason: rows}, "truncated", "unterminated", "eval_rows_in_train",
              "train" | "eval" | "test": {"rows", "tokens", "trained_tokens"},
              "sources": [{"path", "weight", "rows", "sha256", "tokens_sha256", "rows_sha256"}],
              "template_sha256", "tokenizer_sha256"}
    """

    train: Rows
    eval: Rows
    test: Rows
    report: dict[str, Any]
    rejected: list[Rejected]  # rows that cannot be used and rows that were dropped


@dataclass(frozen=True)
class Opened:
    """A source with its encoded rows. `digest` is the sha256 of what its files hold and of which kinds they are."""

    source: Source
    files: list[str]
    digest: str
    store: Store


def build(config: ConfigDict, chat: Chat, *, say: Say = print, want: str | None = None) -> Splits:
    """Everything config.data asks for. Says what it does and what it finds through `say`; raises UserError.

    `want`: answers, pairs, rankings, labels, classes or prompts; None is what the task learns from.
    """
    data = config.data
    want = want or wanted(config)
    if want not in ("answers", "classes", "prompts"):
        refuse_what_spoils_preferences(config)
    opened = open_all(config, chat, say, want)
    stores = [o.store for o in opened]
    training = len(sources(data.train))
    fill = config.task == "pretrain" and data.packing
    others = config.kto.loss == "kto"  # apo_zero_unpaired has no baseline
    ledger = Ledger(stores, max_length=room(config, want), on_overlong=data.on_overlong, fill=fill, want=want, others=others)
    if data.on_bad_row == "error":
        fail_on(ledger.rejected)
    if data.on_overlong == "error":
        ledger.refuse_overlong()
    ledger.announce(say)

    part = parts(ledger, training, config, say)
    train = ledger.rows(part == 0, [o.source.weight for o in opened])
    evaluation, test = (ledger.rows(part == p, [1.0] * len(opened)) for p in (1, 2))  # weights are for training
    report = ledger.counts() | {"eval_rows_in_train": leaks(ledger, part) if data.eval else 0}
    for name, rows in (("train", train), ("eval", evaluation), ("test", test)):
        report[name] = {"rows": len(rows), "tokens": int(rows.lengths.sum()), "trained_tokens": int(rows.trained.sum())}
    report["sources"] = [
        {"path": o.source.path, "weight": o.source.weight, "rows": len(o.store)}
        | {"on_hub": kind(o.files[0]) is None, "held_out": i >= training}
        | {"sha256": o.digest, "tokens_sha256": o.store.tokens_sha256, "rows_sha256": o.store.rows_sha256}
        for i, o in enumerate(opened)
    ]
    report["template_sha256"] = sha256(chat.template or "")
    report["tokenizer_sha256"] = sha256(tokenizer_text(chat.tokenizer))
    tell(report, ledger.overlong(), say)
    return Splits(train, evaluation, test, report, ledger.rejected + ledger.dropped())


def data_hash(report: Mapping[str, Any]) -> str:
    """sha256 of the rows of every source of a report: what they encode to, and their labels, ranks and other columns."""
    return sha256("".join(source["rows_sha256"] for source in report["sources"]))


def room(config: ConfigDict, want: str) -> int:
    """The most tokens of a row; of a prompt, beside its answer. Raises UserError."""
    longest = config.data.max_length
    if want != "prompts":
        return longest
    if config.data.on_overlong == "truncate":
        raise UserError("--config.data.on_overlong=truncate: a prompt that is cut short asks something else; use drop or error")
    answer = config[config.task].max_completion_length
    if answer >= longest:
        raise UserError(
            f"--config.data.max_length={longest}: holds a prompt and its answer, and --config.{config.task}."
            f"max_completion_length={answer} leaves no room for the prompt; raise the one or lower the other"
        )
    return longest - answer


def refuse_what_spoils_preferences(config: ConfigDict) -> None:
    """Only whole answers are compared, and nothing but answers. Raises UserError."""
    for key, value, why in (
        ("loss_on", "all", "preferences compare answers alone; use answers or last_answer"),
        ("on_overlong", "truncate", "an answer that is cut short is not the one that was judged; use drop or error"),
    ):
        if config.data[key] == value:
            raise UserError(f"--config.data.{key}={value}: {why}")


def open_all(config: ConfigDict, chat: Chat, say: Say, want: str) -> list[Opened]:
    """The sources of data.train, then those of data.eval, encoded."""
    train, held_out = sources(config.data.train), sources(config.data.eval)
    if not train:
        raise UserError("data.train names no data; give a file, folder, glob or hub id: --config.data.train=rows.jsonl")
    for source in train + held_out:
        if config.task == "classify" and source.format not in (None, "label"):
            raise UserError(
                f"data source {source.path}: format {source.format!r}: --config.task=classify learns rows of text and label; "
                "leave the source's format out, or use --config.task=sft"
            )
    found = [(source, files := resolve(source.path), content(files)) for source in train + held_out]
    # a prompt that lists the labels of all training data changes with any of it
    context = "".join(digest for _, _, digest in found[: len(train)]) if "{labels}" in config.data.label_prompt else ""
    return [open_one(*each, context, config, chat, say, want) for each in found]


def open_one(
    source: Source, files: list[str], digest: str, context: str, config: ConfigDict, chat: Chat, say: Say, want: str
) -> Opened:
    """The encoded rows of one source: from the cache where its content is known, else tokenised now."""
    data = config.data
    root = cache_root(data)
    key = cache_key(source, digest + context, data, chat, want)
    started, fresh = time.perf_counter(), not (root / key).exists()
    if fresh:
        with cache.entry(root, key) as place:
            cache.write(place, encode(read_examples(source, data, say, want), chat, data.workers, say, want), files)
    store = Store(root / key, files)
    took = f"tokenised in {time.perf_counter() - started:.1f} s" if fresh else "from the cache"
    say(f"{source.path}: {counted(len(store))}, {int(store.offsets[-1]):,} tokens, {took}")
    return Opened(source, files, digest, store)


def cache_root(data: ConfigDict) -> Path:
    """Where encoded rows are kept."""
    return Path(data.cache_dir or "~/.cache/sftjax/data").expanduser()


def content(files: Sequence[str]) -> str:
    """sha256 over what the files hold and how they are read, whatever they are called; of a hub dataset, over its rows."""
    whole = hashlib.sha256()
    for file in files:
        one = hashlib.sha256(f"{kind(file)}\n".encode())
        if kind(file) is None:
            for _, row in read(file):
                one.update(json.dumps(row, sort_keys=True, default=str).encode())
        else:
            with open_bytes(file) as stream:
                while block := stream.read(1 << 20):
                    one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def cache_key(source: Source, digest: str, data: ConfigDict, chat: Chat, want: str) -> str:
    """sha256 of all that decides what a source's rows encode to: content, options, template, tokenizer, our own version."""
    decides = {
        "version": cache.VERSION,
        "content": digest,
        "want": want,
        "format": source.format or data.format,
        "columns": dict(source.columns or data.columns),
        "roles": dict(data.roles),
        "system": data.system,
        "label_prompt": data.label_prompt,
        "loss_on": chat.loss_on,
        "templates": chat.templates,
        "tokenizer": tokenizer_text(chat.tokenizer),
    }
    if "strftime_now" in "".join(chat.templates.values()):
        decides["day"] = str(chat.day)
    if want == "classes":
        decides["labels"] = chat.labels  # type: ignore[attr-defined]  # of data.classes
    return sha256(json.dumps(decides, sort_keys=True))


def tokenizer_text(tokenizer: Any) -> str:
    """All that a tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{type(tokenizer).__name__} {tokenizer.special_tokens_map} {rules}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parts(ledger: Ledger, training: int, config: ConfigDict, say: Say) -> np.ndarray:
    """0 = train, 1 = eval, 2 = test of every row; by content where no rows are held out by data.eval."""
    if config.data.eval:
        return (ledger.store >= training).astype(np.int8)
    return parted(ledger.prompt, ledger.key, config.data.split, config.seed, say)


def leaks(ledger: Ledger, part: np.ndarray) -> int:
    """Kept eval rows that say what some kept train row says."""
    kept = ledger.fate == KEPT
    return int(np.isin(ledger.key[kept & (part == 1)], ledger.key[kept & (part == 0)]).sum())


def tell(report: dict[str, Any], overlong: str, say: Say) -> None:
    """The counts in a line; raises UserError where nothing is left to train on, with what was said of overlong rows."""
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in report["dropped"].items()) or "none"
    read = f"{counted(report['read'])} read, {report['kept']:,} kept, dropped: {dropped}"
    if not report["train"]["rows"]:
        raise UserError(f"no rows are left to train on: {read}{overlong and f'. {overlong}'}")
    sizes = ", ".join(f"{name} {report[name]['rows']:,}" for name in ("train", "eval", "test"))
    tokens, trained = report["train"]["tokens"], report["train"]["trained_tokens"]
    trains = f"{trained:,} of {tokens:,} training tokens are trained" if trained else f"{tokens:,} tokens to train on"
    say(f"{read}; {sizes}; {trains}")
    if report["eval_rows_in_train"]:
        say(f"warning: data.train also holds {counted(report['eval_rows_in_train'])} of data.eval: evaluation will look too good")
