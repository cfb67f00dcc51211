"""What every task starts from and ends with: the data, the model with its method applied, a run's directory.

job = Job(config, workdir);  params, tally = job.fit(loss, eval_loss);  job.finish(tally, ...)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from sftjax import hosts, sharding, tree
from sftjax.check import ROLLOUTS, check
from sftjax.config import UserError
from sftjax.data import pipeline
from sftjax.data.batch import Batch
from sftjax.data.prompts import stream
from sftjax.data.rows import Rows
from sftjax.data.stream import WHOLE, eval_batches
from sftjax.generate.open import ends
from sftjax.hf.load import check_length
from sftjax.losses import Loss
from sftjax.models.attention import check_heads
from sftjax.models.decoder import Output, forward
from sftjax.tasks.base import Base
from sftjax.tasks.rewards import fingerprint
from sftjax.train import loop
from sftjax.train.evaluation import evaluator
from sftjax.train.manifest import difference, length_histogram, manifest, show
from sftjax.train.meter import Tally
from sftjax.train.progress import Progress, mfu, model_flops_per_token, say
from sftjax.train.report import write_report
from sftjax.train.run import Run
from sftjax.train.step import Step, make_step
from sftjax.weights import kinds, select

Answerer = Callable[[Any], list[dict[str, Any]]]  # params -> what metrics.jsonl tells of each prompt
# changes that leave a checkpoint its shapes and not its meaning: by how much its LoRA counts, and over what
MEANING = (*(f"config.{key}:" for key in ("lora.alpha", "lora.alpha_pattern", "lora.rslora", "lora.init")), "adapter:")


class Job:
    """One run of one task. Raises UserError before anything is written where the config, the data or the model will not do."""

    def __init__(self, config: ConfigDict, workdir: str | Path, *, force: bool = False):
        check(config)
        self.began = time.perf_counter()
        self.config = config
        self.say: Callable[[str], None] = say if hosts.first() else lambda _: None
        with hosts.agreeing():
            self.mesh = sharding.make_mesh(**config.mesh)
            hosts.refuse_idle(self.mesh)
            check_batch(config, self.mesh)
            self.base = Base(config)
            check_length(config.data.max_length, self.base.source_config, self.base.directory)
            check_routers(config, self.base)
            check_classes(config, self.base)
            check_heads(
                self.base.source_config.heads,
                self.base.source_config.kv_heads,
                self.mesh.shape[sharding.HEADS],
                self.mesh.shape[sharding.SEQUENCE],
            )
            self.chat = self.base.chat
            self.stop_ids = ends(self.base.directory, self.chat)
            self.run = Run(workdir, use_tensorboard=config.train.tensorboard)
        hosts.refuse_unshared(self.run.workdir)
        self.splits = hosts.in_turn(lambda: pipeline.build(config, self.chat, say=self.say), pipeline.cache_root(config.data))
        with hosts.agreeing():
            self.run.lock()
            check_patience(config, self.splits.eval)
            self.stream = stream(self.splits.train, config, mine=hosts.own_rows(self.mesh, config.train.batch_size))
            if self.stream.few:
                self.say(self.stream.few)
            self.manifest = self.describe()
            self.refuse_another_run(force)
        hosts.refuse_differences(same_everywhere(self.manifest))
        self.decoder, params, mask = self.base.build(self.mesh)
        self.trainable, self.frozen = tree.split(params, mask)
        self.mask, self.like = mask, jax.eval_shape(lambda: params)  # what trains is given away
        self.say_what_trains(params, mask)

    def placed(self, params: Any) -> Any:
        """Of a model beside the policy, on the run's devices."""
        return sharding.placed(params, self.mesh)

    @functools.cached_property
    def forward(self) -> Callable[..., Output]:
        return forward(self.decoder)

    def fit(self, loss: Loss, eval_loss: Loss, answer: Answerer | None = None) -> tuple[Any, Tally]:
        """Trains by this loss, and is measured by that one on held-out rows. Returns (params, tally), as `iterate` does."""
        c, means = self.config, evaluator(eval_loss, self.frozen, self.mesh)

        def learn(optimizer: optax.GradientTransformation) -> Step:
            micro_batches = c.train.batch_size // (c.train.micro_batch or c.train.batch_size)
            return make_step(loss, optimizer, seed=c.seed, micro_batches=micro_batches, clip=c.optim.clip)

        def evaluate(trainable: Any, part: str) -> dict[str, float]:
            return means(trainable, self.held_out(getattr(self.splits, part)))

        return self.iterate(learn, evaluate, answer, flops_per_token=self.flops_per_token())

    def iterate(
        self, learn: loop.Learn, evaluate: loop.Evaluate, answer: Answerer | None = None, **options: Any
    ) -> tuple[Any, Tally]:
        """Trains, from the newest checkpoint where there is one; `trainable` is used up. Returns (params, tally).

        `answer` answers a few prompts, every train.generate_every steps; `options` are loop.fit's.
        """
        self.flops = options.get("flops_per_token", 0.0)
        shown = Progress(self.stream.steps_total, log_every=self.config.train.log_every, quiet=not hosts.first())
        with jax.set_mesh(self.mesh), shown as progress:

            def watch(step: int, trainable: Any) -> None:
                if answer and (answers := answer(tree.join(trainable, self.frozen))):
                    self.run.note(step, "sample", {"answers": answers})
                    asked, said = (one_line(answers[0][part]) for part in ("prompt", "text"))
                    progress.say(f"step {step}: asked {asked!r} it says {said!r}")

            state, tally, self.steady = loop.fit(
                self.run,
                self.with_scaled_rate(),
                self.trainable,
                self.frozen,
                learn=learn,
                evaluate=evaluate,
                stream=self.stream,
                mesh=self.mesh,
                progress=progress,
                begins=self.write_what_it_is,
                watch=watch,
                dtype=self.decoder.dtype,
                **options,
            )
        self.skipped = int(state.skipped)
        self.steps = int(state.step)
        return tree.join(state.trainable, self.frozen), tally

    def with_scaled_rate(self) -> ConfigDict:
        """The config with optim.lr as it is for the model's width."""
        c, width = self.config.optim, self.decoder.config.width
        if c.lr_width is None or c.lr_width == width:
            return self.config
        scaled = self.config.copy_and_resolve_references()
        scaled.optim.lr = c.lr * c.lr_width / width
        self.say(f"learning rate {scaled.optim.lr:.2g}: {c.lr:g} is for a width of {c.lr_width}, the model's is {width}")
        return scaled

    def held_out(self, rows: Rows) -> Iterable[Batch]:
        size = eval_rows(self.config)
        return eval_batches(rows, size, self.config.data.max_length, hosts.own_rows(self.mesh, size)) if len(rows) else ()

    def finish(self, tally: Tally, extra: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes summary.json, samples.jsonl and report.html; returns the summary."""
        rows = self.splits.report
        # a run that had ended already has measured nothing now
        steady = self.steady or (self.run.read_json("summary.json") or {}).get("steady_tokens_per_s") or 0.0
        summary = {
            "task": self.config.task,
            "method": self.config.method,
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "tokens": tally.tokens,
            "trained_tokens": tally.trained_tokens,
            "eval_loss_before": (tally.before or {}).get("loss"),
            "eval_loss": (tally.evaluation or {}).get("loss"),
            "best": tally.best,
            "test_loss": (tally.test or {}).get("loss"),
            **extra,
            "tokens_per_s": tally.tokens / tally.seconds if tally.seconds else None,
            "steady_tokens_per_s": steady or None,
            "mfu": mfu(steady, self.flops, jax.devices()[0].device_kind, self.mesh.size) or None,
            "compile_s": tally.compile_s,
            "first_step_s": tally.first_step_s,
            "total_s": time.perf_counter() - self.began,
            "peak_memory_mib": peak_memory_mib(),
            "trainable_parameters": tree.count(self.trainable),
            "parameters": kinds.count(self.like),
            "rows": {"read": rows["read"], "kept": rows["kept"], "dropped": rows["dropped"]},
        }
        self.run.write_lines("samples.jsonl", samples)
        self.run.write_json("summary.json", summary)
        self.run.close()
        if hosts.first():
            write_report(self.run.workdir)
        hosts.gather(0)  # the others wait here until all is written: where they leave, there is a limit
        return summary

    def describe(self) -> dict[str, Any]:
        train, ids = self.splits.train, self.base.trained_tokens
        made_of = manifest(
            self.config,
            data_report=self.splits.report,
            data_hash=pipeline.data_hash(self.splits.report),
            template=self.chat.template,
            base_dir=self.base.directory,
            adapter_dir=self.base.adapter,
            tokenizer_dir=self.base.tokenizer_directory,
            lengths=length_histogram(train.lengths, train.trained),
        )
        if self.config.task in ROLLOUTS:
            made_of["hashes"]["rewards"] = fingerprint(self.config[self.config.task].rewards)
        made_of |= {"labels": list(self.base.labels)} if self.base.labels else {}
        return made_of | {"trained_tokens": dict(zip(self.chat.tokenizer.convert_ids_to_tokens(ids), ids))}

    def refuse_another_run(self, force: bool) -> None:
        """A directory that holds a run of another config, data or base is left alone, unless `force` says to go on in it.

        One that ended before anything was measured, by a mistake in its config for one, holds nothing to go on with.
        """
        saved = self.run.checkpoints.is_dir() and any(self.run.checkpoints.iterdir())
        begun = saved or (self.run.workdir / "metrics.jsonl").exists()
        old = self.run.read_json("manifest.json") if begun else None
        changed = difference(old, self.manifest) if old else []
        if changed and not force:
            raise UserError(
                f"{self.run.workdir} holds a run of something else:\n  "
                + "\n  ".join(changed)
                + "\nuse another --workdir, or --force to go on with its checkpoint"
            )
        if old and saved:
            self.refuse_another_meaning(old, changed)

    def refuse_another_meaning(self, old: dict[str, Any], changed: list[str]) -> None:
        """Not even `force` puts a checkpoint's rows on other tokens, or its LoRA at another scale."""
        meant = [change for change in changed if change.startswith(MEANING)]
        was, now = old.get("trained_tokens"), self.manifest["trained_tokens"]
        if self.config.method != "full" and was is not None and was != now:
            meant.append(f"trained tokens: {show(was)} -> {show(now)}")
        if meant:
            raise UserError(
                f"{self.run.workdir} holds a checkpoint whose numbers would mean something else:\n  "
                + "\n  ".join(meant)
                + "\nuse another --workdir; --force cannot go on with it"
            )

    def write_what_it_is(self) -> None:
        old = self.run.read_json("manifest.json")
        self.run.write_json("config.json", self.config)  # says where things lie today, though they may have moved
        if not old or difference(old, self.manifest):
            self.run.write_json("manifest.json", self.manifest)
        self.run.write_lines("rejected.jsonl", [dataclasses.asdict(row) for row in self.splits.rejected])

    def flops_per_token(self) -> float:
        train = self.splits.train
        length = float((train.lengths.astype(float) ** 2).sum() / train.lengths.sum())  # of the text a token is in
        return model_flops_per_token(self.decoder.config, self.like, self.mask, length)

    def say_what_trains(self, params: Any, mask: Any) -> None:
        table = select.table(params, mask)
        total, trained = sum(n for *_, n, _ in table), sum(t for *_, t in table)
        if trained < total:
            rows = [("leaf", "shape", "trains", "share")]
            rows += [(path, shape, f"{t:,}", share(t, total)) for path, shape, _, t in table if t]
            wide = [max(map(len, column)) for column in zip(*rows)]
            for path, shape, t, of_it in rows:
                self.say(f"  {path:<{wide[0]}}  {shape:<{wide[1]}}  {t:>{wide[2]}}  {of_it:>{wide[3]}}")
        self.say(f"training {trained:,} of {total:,} parameters ({share(trained, total)})")
        if self.base.new_tokens:
            self.say(f"new tokens {' '.join(self.base.new_tokens)}: their rows start as the mean, and train")


def one_line(text: str, most: int = 60) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 4]} ..."


def share(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return f"{percent:.2f} %" if percent >= 0.01 else "< 0.01 %"


def check_batch(config: ConfigDict, mesh: Any) -> None:
    """Refuses a batch that does not divide over micro-batches and devices."""
    c, shards, columns = config.train, sharding.batch_shards(mesh), mesh.shape[sharding.SEQUENCE]
    micro = c.micro_batch or c.batch_size
    if c.batch_size % micro:
        raise UserError(f"train.batch_size={c.batch_size} is no multiple of train.micro_batch={micro}")
    sizes = {"train.micro_batch" if c.micro_batch else "train.batch_size": micro, "eval.batch_size": eval_rows(config)}
    for key, rows in sizes.items():
        if rows % shards:
            raise UserError(
                f"{key}={rows} does not divide over {shards} data shards; use a multiple of {shards} or {fewer(mesh)}"
            )
    if config.task in ROLLOUTS and not c.micro_batch:
        n = config[config.task].num_mini_batches
        if (c.batch_size // n) % shards:
            raise UserError(
                f"train.batch_size={c.batch_size} in {config.task}.num_mini_batches={n} makes updates of {c.batch_size // n} "
                f"answers, which do not divide over {shards} data shards; use a multiple of {shards} for each or {fewer(mesh)}"
            )
    if WHOLE % columns:
        raise UserError(
            f"mesh.sequence={columns} does not divide {WHOLE}, of which rows' lengths are multiples; "
            f"use --config.mesh.sequence={math.gcd(WHOLE, columns)}"
        )
    if (most := config.data.max_length) % columns:
        raise UserError(
            f"data.max_length={most} does not divide over mesh.sequence={columns}; "
            f"use --config.data.max_length={max(most // columns, 1) * columns}"
        )


def fewer(mesh: Any) -> str:
    return " and ".join(f"--config.mesh.{axis}=1" for axis in sharding.BATCH if mesh.shape[axis] > 1)


def eval_rows(config: ConfigDict) -> int:
    """Rows of an evaluation batch: as many as training takes at a time, unless the config says."""
    return config.eval.batch_size or config.train.micro_batch or config.train.batch_size


def check_routers(config: ConfigDict, base: Base) -> None:
    """Refuses to balance routers, and to split experts, that the model does not have."""
    if (shards := config.mesh.expert) != 1 and not base.source_config.experts:
        raise UserError(f"mesh.expert={shards}: {base.directory} has no experts to split; use --config.mesh.data={shards}")
    if (weight := config.loss.router_balance) and not base.source_config.experts:
        raise UserError(f"loss.router_balance={weight:g}: {base.directory} has no experts to balance; leave it 0")


def check_classes(config: ConfigDict, base: Base) -> None:
    """Refuses weights of labels that a classifier does not have."""
    asked = config.classify.class_weights
    if base.labels and not isinstance(asked, str) and (strange := [label for label in asked if label not in base.labels]):
        raise UserError(f"classify.class_weights: {strange[0]!r} is none of the labels {', '.join(base.labels)}")


def check_patience(config: ConfigDict, held_out: Rows) -> None:
    """Refuses to wait for what is not measured."""
    if (patience := config.train.patience) and not len(held_out):
        raise UserError(f"train.patience={patience}: no rows are held out to be better on; hold some out, or leave it 0")


def same_everywhere(manifest: dict[str, Any]) -> dict[str, str]:
    """sha256 of what has to be the same on every host, by what it is called."""
    same = {"version of a package (manifest.json lists them)": manifest["versions"], "config": manifest["config"]}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in (same | manifest["hashes"]).items()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def peak_memory_mib() -> float:
    """Of the device where it counts its own memory, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss / 2**20 if sys.platform == "darwin" else rss / 2**10
