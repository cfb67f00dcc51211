"""sftjax eval: how good a model is on rows that it was not trained on, and whether training made it better.

    a run      its held-out rows, by the model before training and by a checkpoint
    a model    the rows of a file, by it alone or beside another

Each row's loss, of a preference its rewards and log-probs too; of some rows, chosen by the seed as training chooses them, the
answers. All of it with intervals, by tag.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import config as schema
from sftjax import sharding
from sftjax.check import ROLLOUTS, check, refuse_metrics, refuse_rows
from sftjax.config import UserError, parts
from sftjax.data import pipeline
from sftjax.data.chat import Chat
from sftjax.data.pack import permutation
from sftjax.data.rows import Rows
from sftjax.evaluate import heldout, rouge_bleu
from sftjax.evaluate.bootstrap import DRAWS, SHARE
from sftjax.evaluate.figures import Part, by_tag, changed
from sftjax.evaluate.loss import perplexity, row_losses
from sftjax.evaluate.metrics import Sums, row_scores
from sftjax.generate.engine import Engine
from sftjax.generate.open import ends
from sftjax.generate.sampling import choose
from sftjax.hf.model import load
from sftjax.models.decoder import Decoder, forward
from sftjax.tasks import preferred, scored
from sftjax.tasks.base import Base
from sftjax.tasks.export import read_config, refuse_another_base, restore
from sftjax.tasks.job import check_batch, eval_rows
from sftjax.train.files import directory
from sftjax.train.manifest import difference, leaves
from sftjax.train.report import write_report
from sftjax.train.run import Run, clean, read_json
from sftjax.weights import select

ASKED = 200  # rows that are answered, unless another number is asked for
TASKS = ("sft", "classify", "pretrain", *preferred.TASKS, *ROLLOUTS)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One of the models that are compared."""

    name: str
    decoder: Decoder
    params: Any


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the models, in their mesh, on rows that one chat has encoded."""

    sides: Sequence[Side]
    chat: Chat
    stop_ids: Sequence[int]
    rows: Rows
    config: ConfigDict
    mesh: Mesh


def evaluate(
    workdir: str | Path | None = None, config: ConfigDict | None = None, *, model: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """`evaluate_run` of a run's directory, or `evaluate_model`."""
    if model is None and workdir is not None:
        return evaluate_run(workdir, config, **options)
    if model is not None and workdir is None:
        return evaluate_model(model, config, **options)
    raise UserError("evaluate needs the directory of a run, or model= and data=, and not both")


def evaluate_run(
    workdir: str | Path,
    config: ConfigDict | None = None,
    *,
    checkpoint: str | int = "last",
    split: str | None = None,
    out: str | Path | None = None,
    say: Say = print,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint (last, best or a step) beside what it started from; writes to `out`, W/eval where None.

    `config` is the run's own with other wishes about its evaluation; None is as it was trained. `split` is test or eval; None is
    test where the run has such rows. `options` as in `measure`. Returns what eval.json holds. Raises UserError.
    """
    workdir = directory(workdir)
    if split not in (None, "test", "eval"):
        raise UserError(f"--split={split}: needs test or eval")
    own = read_config(workdir)
    if own.task == "classify" and own.classify.by == "head":
        raise UserError(f"--workdir={workdir}: a classifier by its head, whose held-out figures are in {workdir}/report.html")
    if own.task not in TASKS:
        raise UserError(
            f"--workdir={workdir}: a run of task {own.task}, whose held-out figures are in {workdir}/report.html; export it and "
            "use --model with --data for those of other rows"
        )
    config = own if config is None else config
    check(config)
    refuse_another_config(workdir, config)
    check_options(config, options)
    place = Run(out, option="--out") if out else Run(workdir / "eval")
    mesh = sharding.make_mesh(**config.mesh)
    check_batch(config, mesh)
    start = Base(config)
    refuse_another_base(workdir, start)
    splits = pipeline.build(config, start.chat, say=say)
    refuse_other_rows(workdir, splits.report)
    split, rows = held_out(splits, split)
    decoder, params, mask = start.build(mesh)
    tuned, step = restore(workdir, params, mask, checkpoint, say, keep=True)
    decoder = dataclasses.replace(decoder, lower=0)
    sides = [Side(name, decoder, select.uncut(p, decoder.dtype)) for name, p in (("base", params), ("tuned", tuned))]
    subject = Subject(sides, start.chat, ends(start.directory, start.chat), rows, config, mesh)
    of = {"workdir": str(workdir), "step": step, "split": split}
    found = measure(subject, of, place=place, say=say, **options)
    if not out:
        write_report(workdir)
    return found


def evaluate_model(
    model: str | Path,
    config: ConfigDict | None = None,
    *,
    data: Any = None,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    out: str | Path | None = None,
    say: Say = print,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model, with an adapter over it where one is given, on all rows of `data`; beside the model `base`, where given.
    One that ends with a score head is measured as `scored.score_file` says.

    `config` says how rows are read and answered (its `data`, `eval`, `seed` and `task`), and the models' `model.dtype` and
    `model.trust_remote_code`; None is the defaults. Nothing is written where `out` is None. `options` as in `measure`. Returns
    what eval.json would hold. Raises UserError.
    """
    config = config.copy_and_resolve_references() if config is not None else schema.default()
    check(config)
    refuse_rows(data)
    if not data:
        raise UserError("--model needs --data=FILE, the rows that it is measured on")
    model, data = place_of(model), schema.plain(data)
    adapter, base = (None if place is None else place_of(place) for place in (adapter, base))
    check_options(config, options)
    has_scores = bool(scored.head(model, adapter))
    if has_scores:
        refuse_asked(adapter or model, {"base": base, **options})
    place = Run(out, option="--out") if out else None
    how = {"quantize": quantize, "dtype": config.model.dtype, "trust_remote_code": config.model.trust_remote_code}
    m = load(model, adapter=adapter, **how)
    if has_scores:
        return scored.score_file(m, data, config, place=place, batch_size=options.get("batch_size", 16), say=say)
    config.data.train, config.data.eval, config.data.split = (data,), None, (1,)
    config.model.path, config.task = model, "pretrain" if config.task == "pretrain" else "sft"
    sides = [Side("tuned" if base else "model", m.module, m.params)]
    if base:
        other = load(base, **how)
        refuse_head(base, other.config.labels)
        refuse_another_tokenizer(base, model, other.tokenizer, m.tokenizer)
        sides.insert(0, Side("base", other.module, other.params))
    template = None if config.task == "pretrain" else config.data.template
    chat = Chat(m.tokenizer, template=template, loss_on=config.data.loss_on)
    limit = min(side.decoder.config.reach for side in sides)
    config.data.max_length = min(config.data.max_length, limit)
    rows = read_rows(config, chat, say)
    subject = Subject(sides, chat, ends(m.directory, chat), rows, config, sharding.make_mesh(1, 1, 1))
    of = {"model": model, "adapter": adapter, "base": base, "data": data}
    return measure(subject, of, place=place, say=say, **options)


def read_rows(config: ConfigDict, chat: Chat, say: Say) -> Rows:
    """All rows of the one source that is config.data.train; `say` is told what became of them."""
    splits = pipeline.build(config, chat, say=lambda _: None)
    report, dropped = splits.report, splits.report["dropped"]
    told = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in dropped.items()) or "none"
    say(f"{config.data.train[0]}: {report['read']:,} rows read, {report['kept']:,} kept, dropped: {told}")
    return splits.train


def measure(
    subject: Subject,
    of: dict[str, Any],
    *,
    place: Run | None,
    metrics: str | Sequence[str] = (),
    rows: int | None = None,
    max_new_tokens: int | None = None,
    say: Say = print,
    **sampling: Any,
) -> dict[str, Any]:
    """What eval.json holds of `subject`; writes it and predictions.jsonl to `place`, where one is given.

    `metrics`: () is config.eval.metrics, else those that suit the rows. `rows`: how many are answered, 0 for none.
    `max_new_tokens`: None is the config's. `sampling` as in Engine.each.
    """
    config, names = subject.config, [side.name for side in subject.sides]
    longest = usual_length(config) if max_new_tokens is None else max_new_tokens
    questions = chosen(subject, ASKED if rows is None else rows)
    if config.task in ROLLOUTS and not questions:
        raise UserError("no held-out row says what is expected of its answer, so there is nothing to measure answers by")
    metrics = (
        parts(metrics or ())
        or parts(config.eval.metrics)
        or heldout.suited([q.expected or "" for q in questions], [q.label for q in questions])
    )
    answers: list[list[heldout.Answer]] = []
    with jax.set_mesh(subject.mesh):
        likely = likelihoods(subject)
        for side in subject.sides:
            if questions:
                say(f"{side.name}: answering {len(questions):,} of {len(subject.rows):,} rows")
                engine = Engine(side.decoder, side.params, stop_ids=subject.stop_ids)
                answers.append(heldout.answers(engine, questions, chat=subject.chat, max_new_tokens=longest, **sampling))
    tags = [subject.rows.example(i).tags for i in range(len(subject.rows))]
    whole = [Part(tags, likely)] if likely else []
    if questions:
        each = [heldout.sums(a, metrics) for a in answers]
        whole.append(Part([q.tags for q in questions], {name: [one[name] for one in each] for name in each[0]}))
    found = {
        "of": of,
        "rows": len(subject.rows),
        "answered": len(questions),
        "models": names,
        "metrics": list(metrics) if questions else [],
        "how": rouge_bleu.how(metrics, [q.expected or "" for q in questions]) if questions else {},
        "generation": {"max_new_tokens": longest, **sampling},
        "intervals": {"per_cent": SHARE, "draws": DRAWS, "seed": config.seed},
        "figures": by_tag(whole, names, seed=config.seed),
    }
    if len(answers) == 2:
        found["changed"] = changed(questions, answers[0], answers[1], metrics)
    if place is not None:
        place.write_lines("predictions.jsonl", predictions(questions, names, answers, metrics))
        place.write_json("eval.json", found)
    return found


def usual_length(config: ConfigDict) -> int:
    """The most tokens of an answer, where none are asked for."""
    return config[config.task].max_completion_length if config.task in ROLLOUTS else config.eval.max_new_tokens


def usual() -> dict[str, Any]:
    """The options of an evaluation that `measure` takes or hands on, with their defaults."""
    both = [p for of in (measure, Engine.each, choose) for p in inspect.signature(of).parameters.values()]
    return {p.name: p.default for p in both if p.kind is p.KEYWORD_ONLY and p.name not in ("place", "say", "tokenizer")}


def check_options(config: ConfigDict, options: dict[str, Any]) -> None:
    """Raises UserError for options of `measure` that nothing can be measured with: before anything long has begun."""
    known = usual()
    if wrong := next((name for name in options if name not in known), None):
        close = schema.near(wrong, known)
        raise UserError(f"{wrong}: no such option; " + (f"did you mean {close}?" if close else f"there are {', '.join(known)}"))
    refuse_too_few(options)
    choose(**{name: value for name, value in options.items() if name in inspect.signature(choose).parameters})
    metrics = parts(options.get("metrics") or ())
    refuse_metrics(metrics, "--metrics")
    heldout.refuse_missing(metrics or parts(config.eval.metrics))


def refuse_asked(model: str, options: dict[str, Any]) -> None:
    """Raises UserError for options about answers, which a model with a score head gives none of."""
    usually = usual() | {"base": None, "batch_size": options.get("batch_size")}
    if asked := [name for name, value in options.items() if value not in (usually[name], None, (), [])]:
        flag = "--" + {"stop_strings": "stop"}.get(asked[0], asked[0]).replace("_", "-")
        raise UserError(f"{flag}: {model} ends with a score head, and has no such choice; leave it out")


def place_of(model: Any) -> str:
    """A directory or hub id as text. Raises UserError for what is none."""
    if not isinstance(model, (str, Path)):
        raise UserError(f"--model: needs a directory or a hub id, not a {type(model).__name__}")
    return str(model)


def refuse_too_few(options: dict[str, Any]) -> None:
    for name, least in (("rows", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if (n := options.get(name)) is not None and n < least:
            raise UserError(f"--{name.replace('_', '-')}={n}: needs at least {least}")


def chosen(subject: Subject, most: int) -> list[heldout.Question]:
    """The rows that are answered: by the seed, from those that ask something."""
    rows, config = subject.rows, subject.config
    if config.task == "pretrain":
        return []
    shuffled = (rows.example(i) for i in permutation(len(rows), config.seed).tolist())
    return list(itertools.islice(heldout.questions(subject.chat, shuffled), most))


def likelihoods(subject: Subject) -> dict[str, list[Sums]]:
    """The loss of all rows by each side, and what belongs to it: perplexity, or rewards and log-probs of a preference."""
    c, rows, mesh = subject.config, subject.rows, subject.mesh
    if c.task in ROLLOUTS:
        return {}  # whose rows are prompts
    if c.task in preferred.TASKS:
        return preferred.figures(forward(subject.sides[0].decoder), [side.params for side in subject.sides], rows, c, mesh)
    shared: dict[str, Any] = {"batch_size": eval_rows(c), "max_length": c.data.max_length, "mesh": mesh}
    losses = [row_losses(forward(side.decoder), side.params, rows, **shared) for side in subject.sides]
    return {"loss": losses, "perplexity": [perplexity(loss) for loss in losses]}


def predictions(
    questions: Sequence[heldout.Question],
    models: Sequence[str],
    answers: Sequence[Sequence[heldout.Answer]],
    metrics: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each question, with every model's answer and what it scored."""
    out: list[dict[str, Any]] = [
        {"where": q.where, "tags": list(q.tags), "prompt": q.prompt, "expected": q.expected} for q in questions
    ]
    for model, each in zip(models, answers):
        scores = row_scores(metrics, [a.text for a in each], [a.expected for a in each])
        for i, (row, a) in enumerate(zip(out, each)):
            told = {name: values[i] for name, values in scores.items()}
            row |= {model: a.text, f"{model}_stopped": a.stopped, f"{model}_tokens": a.tokens, f"{model}_scores": told}
            row |= {f"{model}_raw": a.raw} if a.raw != a.text else {}
    return out


def held_out(splits: pipeline.Splits, split: str | None) -> tuple[str, Rows]:
    """The rows of a split; of test, where none is named and there are any, else of eval."""
    name = split or ("test" if len(splits.test) else "eval")
    rows = splits.test if name == "test" else splits.eval
    if not len(rows):
        asked = f"--split={split}: the" if split else "the"
        raise UserError(f"{asked} run holds no such rows out; evaluate an export on a file instead, with --model and --data")
    return name, rows


def refuse_another_config(workdir: Path, config: ConfigDict) -> None:
    """Another config would hold out other rows, some of which the run was trained on."""
    old = read_json(workdir / "manifest.json") or {}
    new = {"config": leaves(clean(config)[0]), "hashes": old.get("hashes", {})}
    changes = [change for change in difference(old, new) if not change.startswith("config.eval.")]
    if changes:
        raise UserError(
            f"--config: the run in {workdir} was trained otherwise:\n  "
            + "\n  ".join(changes)
            + "\nleave --config out, the run keeps its own; --config.eval.KEY=VALUE changes how it is evaluated"
        )


def refuse_other_rows(workdir: Path, report: dict[str, Any]) -> None:
    """Rows that are not those of the run may be rows that it was trained on, for all one knows."""
    old = read_json(workdir / "manifest.json") or {}
    if old.get("hashes", {}).get("data") != pipeline.data_hash(report):
        raise UserError(
            f"--workdir={workdir}: the data is not what the run was trained on, so its held-out rows are not known any more; "
            "put that back, or export the run and use --model with --data"
        )


def refuse_head(model: str, labels: Sequence[str]) -> None:
    if labels:
        raise UserError(
            f"{model}: ends with a score head ({', '.join(labels[:5])}), which generates no text; the figures of "
            "its held-out rows are in its run's report"
        )


def refuse_another_tokenizer(base: str, model: str, one: Any, other: Any) -> None:
    if pipeline.tokenizer_text(one) != pipeline.tokenizer_text(other):
        raise UserError(
            f"--base={base}: has another tokenizer than {model}, and losses per token of different tokens do not compare; "
            "sftjax compare takes models of any kind"
        )
