"""What is known of a run beside its state, and the one place where training waits for the device: reading metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from sftjax.config import UserError
from sftjax.train.progress import Progress, mfu
from sftjax.train.run import Run

WARM = 2  # steps after a start that are left out of the steady speed
PREFERENCES = {  # name in summary.json -> metric of a preference loss
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
    "kl": "kl",
}


@dataclass
class Tally:
    """Counts over all resumes of a run; saved with every checkpoint."""

    before: dict[str, float] | None = None  # evaluation of the untrained model
    evaluation: dict[str, float] | None = None  # the last one
    best: dict[str, float] | None = None  # {"step", "loss"} of the best one; of a policy {"step", "reward"}
    test: dict[str, float] | None = None  # the trained model's, on rows that decided nothing
    stale: int = 0  # evaluations since the best
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # in training steps; evaluation, saving and compiling left out
    compile_s: float = 0.0
    first_step_s: float = 0.0  # from where the weights are in place to the first step's end, since the last start

    def evaluated(self, step: int, evaluation: dict[str, float]) -> bool:
        """Notes an evaluation; True where it is the best so far. One that is empty, nothing being held out, is none."""
        self.evaluation = evaluation
        if not evaluation:
            return False
        figure, sign = ("reward", 1) if "reward" in evaluation else ("loss", -1)
        best = -math.inf if self.best is None else sign * self.best[figure]
        better = sign * evaluation[figure] > best  # never where it is nan
        if better:
            self.best = {"step": step, figure: evaluation[figure]}
        self.stale = 0 if better else self.stale + 1
        return better

    def preferences(self) -> dict[str, float]:
        """{"accuracy_before", "accuracy", "test_accuracy", ...}: for summary.json, what was evaluated of PREFERENCES."""
        when = {"{}_before": self.before, "{}": self.evaluation, "test_{}": self.test}
        return {
            form.format(name): evaluation[metric]
            for name, metric in PREFERENCES.items()
            for form, evaluation in when.items()
            if evaluation and metric in evaluation
        }

    def rewards(self) -> dict[str, float]:
        """{"reward_before", "reward", "test_reward", "rewards/exact_match_before", ...}: of a policy, what was evaluated."""
        when = {"{}_before": self.before, "{}": self.evaluation, "test_{}": self.test}
        return {
            form.format(name): x
            for form, evaluation in when.items()
            for name, x in (evaluation or {}).items()
            if name in ("reward", "length", "stopped") or name.startswith("rewards/")
        }

    def stale_for(self, evaluations: int) -> bool:
        """Whether that many evaluations, or more, were no better than the best; never where it is 0."""
        return 0 < evaluations <= self.stale


class Meter:
    """Holds the metrics of steps under way until they are read; logs them, shows them, and counts time and tokens."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        tally: Tally,
        *,
        rate: Callable[[int, int], Any],
        epoch: Callable[[int], float],
        flops_per_token: float,
        devices: int,
        max_bad_steps: int,
    ):
        self.run, self.progress, self.tally = run, progress, tally
        self.rate, self.epoch, self.max_bad_steps = rate, epoch, max_bad_steps
        self.flops_per_token, self.devices = flops_per_token, devices
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.steps = 0  # read since this start
        self.steady_tokens, self.steady_seconds = 0, 0.0
        self.mark = time.perf_counter()

    def start(self) -> None:
        """The clock starts again, after work that is no training."""
        self.mark = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.pending.append((step, metrics))

    def read(self, upto: int) -> None:
        """Logs and shows every step <= `upto`, waiting for it. Raises UserError after too many bad steps in a row."""
        ready = [entry for entry in self.pending if entry[0] <= upto]
        if not ready:
            return
        del self.pending[: len(ready)]
        metrics = [{name: x.item() for name, x in m.items()} for m in jax.device_get([m for _, m in ready])]
        seconds, self.mark = time.perf_counter() - self.mark, time.perf_counter()
        tokens = sum(m["tokens"] for m in metrics)
        speed = tokens / max(seconds, 1e-9)
        self.steps += len(ready)
        self.tally.seconds += seconds
        self.tally.tokens += tokens
        self.tally.trained_tokens += sum(m["trained_tokens"] for m in metrics)
        if self.steps > WARM:
            self.steady_tokens += tokens
            self.steady_seconds += seconds
        for (step, _), m in zip(ready, metrics):
            lr = float(self.rate(step, m["skipped"]))
            self.run.log(step, m | {"lr": lr, "epoch": self.epoch(step), "tokens_per_s": speed})
            if m["bad"] >= self.max_bad_steps:
                raise UserError(
                    f"step {step}: loss or gradient was not finite for {m['bad']} steps in a row, and none of them changed the "
                    f"model; try a lower --config.optim.lr or more --config.optim.warmup"
                )
        used = mfu(speed, self.flops_per_token, jax.devices()[0].device_kind, self.devices)
        shown = {"reward": m.get("reward"), "loss": m["loss"], "kl": m.get("kl") if "reward" in m else None}
        self.progress.update(step, shown | {"lr": lr, "tokens_per_s": speed, "mfu": used})

    @property
    def steady(self) -> float:
        """Tokens a second since this start, its first steps left out; 0 where there were no more."""
        return self.steady_tokens / self.steady_seconds if self.steady_seconds else 0.0
