"""`sftjax generate`: every row of a file answered, a JSON object a line in the file's own order.

{"messages": [...] | "prompt": "...", "answer": "...", "expected": "..." | null, "stopped": true, "raw": "..."}

`raw` is there where the model wrote more than the answer: its thought before it.

Answers are kept beside the file as they come, and the same command goes on from there after a kill: each row's random numbers
are its own, so what comes is what would have come.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from sftjax.config import UserError
from sftjax.data.chat import Chat, as_dict
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected, fail_on
from sftjax.data.lines import Journal, new_file, whole
from sftjax.evaluate.heldout import Question, question
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.open import engine_of, open_model
from sftjax.generate.questions import UNASKED, read_questions
from sftjax.hf.load import resolve
from sftjax.train.manifest import hash_weights


def run_generate(
    model: str,
    *,
    data: str,
    out: str,
    adapter: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    **options: Any,
) -> None:
    """Answers `data`, a file of rows as training reads them or of mere questions, into `out`. `options` as in Engine.each.

    `out` is whole or not there; what an earlier call with the same arguments had answered is not asked again. Raises UserError
    where it exists and not `force`, and for rows that cannot be asked, before the first answer.
    """
    target = new_file(out, force=force)
    opened = open_model(model, adapter, quantize)
    engine, chat = engine_of(opened)
    rows = list(read_questions(data, template=bool(chat.template)))
    fail_on([row for row in rows if isinstance(row, Rejected)], *UNASKED)
    examples = [row for row in rows if isinstance(row, Example)]
    if not chat.template and any(example.messages for example in examples):
        hint = "a base model takes rows of prompt and completion, or text"
        raise UserError(f"--model={model}: has no chat template, and {data} has conversations; {hint}")
    questions = ask(engine, chat, examples)
    each = partial(engine.each, [q.ids for q in questions], tokenizer=chat.tokenizer, **options)
    each()  # what is wrong with an option is told before a file is written
    beside = resolve(adapter, needs="adapter_config.json") if adapter else None
    weights = [hash_weights(folder) for folder in (opened.directory, beside) if folder]
    asked = [(q.ids, line(chat, q, Generated([], False))) for q in questions]
    how = {name: value for name, value in options.items() if name != "batch_size"}  # with whom a row goes on is nothing to it
    decides = [weights, quantize, str(engine.model.dtype), sorted(engine.stop_ids), how, asked]
    of = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    bars = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with kept(target, of) as journal, whole(target) as file, Progress(*bars, console=console) as progress:
        lines = {row["row"]: row["line"] for row in journal.held[1:]}
        if lines:
            console.print(f"{len(lines)} answers are there from before")
        task = progress.add_task("answering", total=len(questions), completed=len(lines))
        written = 0
        try:
            for row, answer in each(done=[*lines]):
                lines[row] = line(chat, questions[row], answer)
                journal.add({"row": row, "line": lines[row]})
                progress.advance(task)
                while written in lines:
                    file.write(lines[written])
                    written += 1
        except KeyboardInterrupt:
            console.print(f"{len(lines)} of {len(questions)} answers are kept; the same command goes on from there")
            raise
        file.writelines(lines[row] for row in range(written, len(questions)))
    print(f"{len(questions)} answers in {out}")


@contextmanager
def kept(target: Path, of: str) -> Iterator[Journal]:
    """Where answers are kept until `target` is whole: {"of": what was asked of what}, then {"row": 0, "line": ...} as they come.
    An earlier one is gone on with if it is of the same."""
    pipe = target.exists() and not target.is_file()
    path = Path(os.devnull) if pipe else target.with_name(f".{target.name}.kept")
    try:
        journal = Journal(path)
        if journal.held[:1] != [{"of": of}]:
            journal.clear()
            journal.add({"of": of})
    except OSError as e:
        raise UserError(f"--out={target}: cannot be written ({e.strerror or e})") from e
    with journal:
        yield journal
    if not pipe:
        path.unlink()


def ask(engine: Engine, chat: Chat, examples: Sequence[Example]) -> list[Question]:
    """The question of every row. Raises UserError with the rows that have none or one too long for the model."""
    questions, rejected = [], []
    for example in examples:
        try:
            q = question(chat, example)
            if not engine.fits(q.ids):
                raise RowError("", f"the prompt has {len(q.ids)} tokens; the model takes 1 to {engine.limit - 1}")
            questions.append(q)
        except RowError as e:
            rejected.append(Rejected(example.source, example.line, e.field, e.reason))
    fail_on(rejected, *UNASKED)
    return questions


def line(chat: Chat, q: Question, answer: Generated) -> str:
    asked: dict[str, Any] = {"prompt": q.prompt}
    if q.messages:
        asked = {"messages": [as_dict(m) for m in q.messages]}
    said = chat.said(answer.text, answer.ids)
    row = asked | {"answer": said, "expected": q.expected, "stopped": answer.stopped}
    row |= {"raw": answer.text} if answer.text != said else {}
    return json.dumps(row, ensure_ascii=False) + "\n"
