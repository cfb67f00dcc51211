"""`sftjax generate`: every row of a file answered, a JSON object a line in the file's own order.

{"messages": [...] | "prompt": "...", "answer": "...", "expected": "..." | null, "stopped": true}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from sftjax.config import UserError
from sftjax.data.chat import Chat, as_dict
from sftjax.data.example import Example, RowError
from sftjax.data.formats import Rejected, fail_on
from sftjax.data.lines import new_file, whole
from sftjax.evaluate.heldout import Question, question
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.open import open_engine
from sftjax.generate.questions import UNASKED, read_questions


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

    `out` is whole or not there. Raises UserError where it exists and not `force`, and for rows that cannot be asked, before the
    first answer.
    """
    target = new_file(out, force=force)
    engine, chat = open_engine(model, adapter, quantize)
    rows = list(read_questions(data, template=bool(chat.template)))
    fail_on([row for row in rows if isinstance(row, Rejected)], *UNASKED)
    examples = [row for row in rows if isinstance(row, Example)]
    if not chat.template and any(example.messages for example in examples):
        hint = "a base model takes rows of prompt and completion, or text"
        raise UserError(f"--model={model}: has no chat template, and {data} has conversations; {hint}")
    questions = ask(engine, chat, examples)
    answers = engine.each([q.ids for q in questions], tokenizer=chat.tokenizer, **options)
    bars = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with whole(target) as file, Progress(*bars, console=Console(stderr=True)) as progress:
        task = progress.add_task("answering", total=len(questions))
        waiting: dict[int, Generated] = {}
        written = 0
        for row, answer in answers:
            progress.advance(task)
            waiting[row] = answer
            while written in waiting:
                file.write(line(questions[written], waiting.pop(written)))
                written += 1
    print(f"{len(questions)} answers in {out}")


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


def line(q: Question, answer: Generated) -> str:
    asked: dict[str, Any] = {"prompt": q.prompt}
    if q.messages:
        asked = {"messages": [as_dict(m) for m in q.messages]}
    row = asked | {"answer": answer.text, "expected": q.expected, "stopped": answer.stopped}
    return json.dumps(row, ensure_ascii=False) + "\n"
