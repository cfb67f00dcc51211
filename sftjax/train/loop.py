"""THE loop: batches in, a trained state out. It evaluates, logs, saves, resumes and stops; the mathematics is elsewhere.

A run is its step number and a `State`: the batch and the keys of a step are functions of the number, its learning rate of the
number less the updates that were skipped. So a run that was killed anywhere and is started again computes, bit for bit, what
it would have computed. The loop waits for the device only where metrics are read, one step late.

Where a policy learns from what it does, the stream gives prompts and `collect` makes the batch of them: the policy as it is
now answers, and the answers are rewarded. That is a function of the step number and the state too.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Lowered
from ml_collections import ConfigDict

from sftjax import hosts
from sftjax.data.stream import prefetch
from sftjax.train import optim
from sftjax.train.checkpoint import Checkpoints
from sftjax.train.evaluation import report, told
from sftjax.train.meter import WARM, Meter, Tally
from sftjax.train.places import begin, freed
from sftjax.train.progress import Progress
from sftjax.train.run import Run
from sftjax.train.step import State, Step, init_state
from sftjax.train.stop import Stopped, stop_signals
from sftjax.weights.lora import rates

Figures = dict[str, float]
Learn = Callable[[optax.GradientTransformation], Step]
Evaluate = Callable[[Any, str], Figures]
Collect = Callable[[int, State, Any], tuple[Any, Figures]]


class Source(Protocol):
    """What a run learns from, by the number of the step: data.stream.Stream, data.prompts.Prompts."""

    steps_total: int

    def epoch(self, step: int) -> float: ...

    def batch(self, step: int) -> Any: ...


def fit(
    run: Run,
    config: ConfigDict,
    trainable: Any,
    frozen: Any,
    *,
    learn: Learn,
    evaluate: Evaluate,
    stream: Source,
    mesh: Mesh,
    progress: Progress,
    begins: Callable[[], None] = lambda: None,
    collect: Collect | None = None,
    updates: int = 1,
    kept: Any = (),
    flops_per_token: float = 0.0,
    watch: Callable[[int, Any], None] | None = None,
    dtype: Any = None,
) -> tuple[State, Tally, float]:
    """Trains from the newest checkpoint, or from the start, to the stream's last step.

    trainable  is given away: its memory becomes the state's
    learn      makes the step from the optimiser; it is compiled here. One step changes what trains `updates` times, all at one
               learning rate
    begins     called once the state stands, restored or new: before, nothing says that there is such a run
    evaluate   (trainable, "eval" or "test") -> figures of held-out rows, the best checkpoint being that of the highest
               "reward" where there is one, else of the lowest "loss"; {} where nothing is held out
    collect    (steps taken, state, what the stream gives) -> (the step's batch, numbers for metrics.jsonl); None: the stream
               gives batches. It must not keep the state's arrays, which the step uses up
    kept       the state's `kept` to start with
    watch      is shown what trains, with the step, every train.generate_every steps
    dtype      is what the loss computes in

    Returns the state, the tally and the steady tokens a second. Raises Stopped where a signal asked for it, and UserError.
    """
    entered, c, total = time.perf_counter(), config.train, stream.steps_total
    rate = optim.schedule(config.optim, total)
    optimizer = optim.optimizer(config.optim, lambda n: rate(n // updates), rates(trainable, config.lora.lr_ratio))
    step_fn = learn(optimizer)
    eval_every = math.ceil(total / 5) if c.eval_every is None else c.eval_every
    save_every = eval_every if c.save_every is None else c.save_every

    state = begin(lambda t: init_state(t, optimizer, dtype, kept), trainable, mesh, offload=config.optim.offload)
    tally, start, compiled = Tally(), 0, None
    with Checkpoints(run.checkpoints, keep=c.keep, say=progress.say) as checkpoints, stop_signals() as asked:
        restored = checkpoints.restore(freed(state)) if checkpoints.steps() else None
        begins()
        if restored:
            start, state, tally = restored.step, restored.state, Tally(**restored.extras)
            checkpoints.forget_after(start)
            progress.begin(start)
            progress.say(f"resuming after step {start} of {total}")
        run.resume_from(start if restored else -1)
        if tally.before is None:
            tally.before = tally.evaluation = evaluate(state.trainable, "eval")
            report(run, progress, 0, tally.before)
        meter = Meter(
            run,
            progress,
            tally,
            rate=lambda step, skipped: rate((step * updates - 1 - skipped) // updates),
            epoch=stream.epoch,
            flops_per_token=flops_per_token,
            devices=mesh.size,
            max_bad_steps=c.max_bad_steps,
        )
        vote = hosts.votes(mesh)
        for step, batch in prefetch(stream.batch, start, total):
            if tally.stale_for(c.patience):
                progress.say(f"step {step}: no better for {tally.stale} evaluations, stopping early")
                break
            collected: Figures = {}
            if collect:
                batch, collected = collect(step, state, batch)
            batch = hosts.to_devices(batch, mesh)
            if compiled is None:
                progress.say("compiling the training step")
                began = time.perf_counter()
                compiled = lower(step_fn, state, frozen, batch).compile()
                tally.compile_s = time.perf_counter() - began
                meter.start()
            began = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)  # a batch of another shape would be an error
            step += 1
            if collect:  # the next batch waits for this step's policy in any case
                jax.block_until_ready(state)
                collected["seconds/learn"] = time.perf_counter() - began
            meter.add(step, metrics | {name: np.float64(x) for name, x in collected.items()})
            if step - start <= WARM:
                meter.read(step)
                if step - start == 1:
                    tally.first_step_s = time.perf_counter() - entered
                    progress.say(f"first step after {tally.first_step_s:.1f} s, of which compiling {tally.compile_s:.1f}")
            elif (seen := step if collect else step - 1) % c.log_every == 0:
                meter.read(seen)
            evaluates = step == total or due(step, eval_every)
            stops = vote(asked.signum)
            saves = step == total or due(step, save_every) or bool(stops)
            watches = due(step, c.generate_every)
            if watches and watch:
                meter.read(step)
                watch(step, state.trainable)
            if evaluates:
                meter.read(step)
                saves |= tally.evaluated(step, evaluate(state.trainable, "eval"))
                report(run, progress, step, tally.evaluation)
            saves |= tally.stale_for(c.patience)
            if saves:
                meter.read(step)
                run.flush()
                checkpoints.save(step, state, dataclasses.asdict(tally), best=int(tally.best["step"]) if tally.best else None)
            if evaluates or saves or watches:
                meter.start()
            if stops and step < total:
                checkpoints.wait()
                raise Stopped(f"stopped at step {step} of {total} and saved; run the same command again to go on", stops)
        checkpoints.wait()
    tally.test = evaluate(state.trainable, "test")
    if tally.test:
        progress.say(f"test {told(tally.test)}, which decided nothing")
    return state, tally, meter.steady


def due(step: int, every: int) -> bool:
    """At every `every`-th step; never where it is 0."""
    return bool(every) and step % every == 0


def lower(step: Step, state: State, frozen: Any, batch: Any) -> Lowered:
    """The compiler's input: the step for arrays like these, its state donated and the new one where the old one is."""
    same = jax.tree.map(lambda x: x.sharding, state)  # where XLA would put the new state, the next step may refuse
    return jax.jit(step, donate_argnums=0, out_shardings=(same, None)).lower(state, frozen, batch)
