"""Answers kept as they come, by what was asked of whom, so that an interrupted comparison goes on without paying twice.

    answers.jsonl  {"key": sha256 of (model by content, prompt, options), "text": ..., "stopped": ..., tokens, seconds}

A refused row cost nothing and is asked again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import as_dict
from sftjax.data.lines import Journal
from sftjax.evaluate.endpoint import Reply
from sftjax.evaluate.prompts import Ask
from sftjax.train.files import writing


class Kept:
    """`with Kept(out / "answers.jsonl") as kept: kept[key] = reply`."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path.parent):
            self.journal = Journal(path)
        self.replies: dict[str, Reply] = {}
        for held in self.journal.held:
            try:
                key = held.pop("key")
                self.replies[key] = Reply(**held)
            except (TypeError, KeyError):
                continue  # somebody else's

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.replies

    def __setitem__(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        if reply.refused is None:
            with writing(self.path.parent):
                self.journal.add({"key": key, **{name: value for name, value in asdict(reply).items() if name != "refused"}})


def key(identity: str, ask: Ask, options: dict[str, Any]) -> str:
    """Of one question to one model."""
    turns = [as_dict(m) for m in ask.messages] if ask.text is None else ask.text
    asked = [identity, turns, ask.tools, options]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def open_out(out: str) -> Path:
    """The directory of a comparison: a new or empty one, or one that a comparison has begun. Raises UserError."""
    where = Path(out).expanduser()
    if where.is_file():
        raise UserError(f"--out={out}: is a file, where a directory is needed")
    if where.is_dir() and any(where.iterdir()) and not (where / "answers.jsonl").is_file():
        raise UserError(f"--out={out}: has other files in it; give a new directory, or that of a comparison to go on with")
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / "answers.jsonl").touch()
    except OSError as e:
        raise UserError(f"--out={out}: cannot be made or written ({e.strerror})") from e
    return where
