"""GRPO and RLOO: several answers to each prompt, those that earn more than the others become likelier.

    state   s_t  the prompt and the answer so far      action     a_t  the token that comes next
    reward       of a whole answer, by functions       advantage  A    the reward less that of the prompt's other answers
    policy  pi   the model                             return          the reward, for every action of the answer

A step: P = train.batch_size / num_generations prompts, G = num_generations answers to each by the policy as it is, their rewards,
and num_iterations * num_mini_batches updates by

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta KL(pi || pi_ref),   rho = pi(a_t | s_t) / pi_old(a_t | s_t)

arXiv:2402.03300 (GRPO), 2402.14740 (RLOO), 2503.14476 (DAPO), 2503.20783 (Dr. GRPO): losses/policy.py. No value is learnt.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sftjax import hosts, tree
from sftjax.config import UserError
from sftjax.losses import Loss
from sftjax.losses.policy import Rollouts, action_logps, group_advantages, grpo, leave_one_out, normalised
from sftjax.losses.tokens import Forward
from sftjax.tasks.critics import Apart, Judge
from sftjax.tasks.job import Job
from sftjax.tasks.reference import reference
from sftjax.tasks.rewards import Reward, Rewards
from sftjax.tasks.rollouts import Actor, figures, in_parts, named, summary
from sftjax.train.step import State, Step, make_step, over_minibatches


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    c = config.grpo
    judges: list[Judge | Apart] = []

    def model(directory: str) -> Reward:
        adapter = (Path(directory).expanduser() / "adapter_config.json").is_file()
        judges.append(Judge(directory) if adapter else Apart(directory))
        return judges[-1]

    rewards = Rewards(c.rewards, c.reward_weights, key="grpo.rewards", model=model)
    cut(config)  # refused before anything is read
    job = Job(config, workdir, force=force)
    for one in judges:
        one.sits(job)
    refer: Any = reference(job) if c.beta else None
    updates = c.num_iterations * c.num_mini_batches
    actor = Actor(job, c, rewards)
    logps = in_parts(job, partial(action_logps, actor.forward))
    learn = partial(step_of, config, loss_of(c, actor.forward))

    def collect(step: int, state: State, prompts: np.ndarray) -> tuple[Rollouts, dict[str, float]]:
        began = time.perf_counter()
        params = tree.join(state.trainable, job.frozen)
        answers = actor.sample(params, job.splits.train, prompts.tolist(), step, c.num_generations)
        sampled = time.perf_counter()
        earned, each = rewards(answers)
        stopped = np.array([a.stopped for a in answers])
        earned = earned - c.missing_eos_penalty * ~stopped
        batch = actor.batch(answers)
        groups = earned.reshape(-1, c.num_generations)
        rollouts = experience(batch, groups, stopped, c)
        if c.beta:
            rollouts = rollouts._replace(reference=logps(refer(params), batch))
        if updates > 1:
            rollouts = rollouts._replace(logps=logps(params, batch))
        shown = {"reward": float(earned.mean()), "reward_std": float(groups.std(1, ddof=1).mean()), **named(each)}
        seconds = {"seconds/rollout": sampled - began, "seconds/score": time.perf_counter() - sampled}
        return hosts.own(rollouts, job.mesh), shown | figures(answers) | seconds

    params, tally = job.iterate(learn, actor.evaluate, collect=collect, updates=updates)
    return job.finish(tally, extra=summary(job, tally), samples=actor.samples(params))


def loss_of(c: ConfigDict, forward: Forward) -> Loss:
    """By config.grpo, over a forward at its temperature."""
    fresh = c.num_iterations * c.num_mini_batches == 1
    return grpo(forward, low=c.epsilon, high=c.epsilon_high or c.epsilon, beta=c.beta, fresh=fresh)


def step_of(config: ConfigDict, loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """All updates of a step's answers."""
    c = config.grpo
    step = make_step(loss, optimizer, seed=config.seed, micro_batches=cut(config), clip=config.optim.clip)
    return over_minibatches(step, seed=config.seed, epochs=c.num_iterations, minibatches=c.num_mini_batches)


def cut(config: ConfigDict) -> int:
    """Micro-batches of an update. Raises UserError where the answers of a step do not divide into updates and those."""
    c, rows = config[config.task], config.train.batch_size
    if rows % c.num_mini_batches:
        raise UserError(f"train.batch_size={rows} is no multiple of {config.task}.num_mini_batches={c.num_mini_batches}")
    part = rows // c.num_mini_batches
    micro = config.train.micro_batch or part
    if part % micro:
        raise UserError(
            f"train.micro_batch={micro}: the {part} answers of an update (batch_size by num_mini_batches) are no multiple of it"
        )
    return part // micro


def experience(batch: Any, groups: np.ndarray, stopped: np.ndarray, c: ConfigDict) -> Rollouts:
    """The answers [N, T] with what each of their actions is worth, by the rewards [P, G] of prompts and their answers."""
    rewards = jnp.asarray(groups, jnp.float32)
    if c.advantage == "rloo":
        advantages = leave_one_out(rewards)
    else:
        advantages = group_advantages(rewards, scale=c.scale_rewards)
    mask = batch.weights * (stopped[:, None] if c.mask_truncated_completions else 1)
    weights, counts = normalised(mask.astype(np.float32), c.loss_type, longest=c.max_completion_length)
    nothing = np.zeros_like(batch.weights)
    worth = np.reshape(advantages, (-1, 1)) * mask
    tokens, _, segments, positions = batch
    return jax.device_get(Rollouts(tokens, weights, segments, positions, counts, nothing, worth, nothing))
