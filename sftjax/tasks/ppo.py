"""PPO: the policy answers, a reward model or a function scores the answers, and a value says which tokens made the difference.

    state   s_t  the prompt and the answer so far          action     a_t  the token that comes next, of pi( . | s_t)
    reward  r_t  -kl_coef log(pi / pi_ref) of a_t, and     return     G_t  the rewards from a_t on, gamma^k of them
                 with the last token the answer's score    advantage  A_t  how much better a_t was than V(s_t) expected
    value   V    a score head, learnt from the returns

A step:

    rollout   train.batch_size prompts, an answer to each by pi_old, the policy as it is      tasks/rollouts.py
    score     what the answers earn; log-probs of pi_old and pi_ref, values of every state    tasks/critics.py
    learn     advantages by GAE, then num_ppo_epochs * num_mini_batches updates by            losses/ppo.py

        -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + vf_coef max((V - G)^2, (clip(V) - G)^2) / 2,   rho = pi / pi_old

arXiv:1707.06347 (PPO), 1506.02438 (GAE), 1909.08593 and 2203.02155 (with language models). Four models, and with LoRA one base:
`critics`. kl_target makes kl_coef adaptive; it is part of the State, so a run that was killed goes on with what it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from sftjax import hosts, tree
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.losses import Loss, ppo
from sftjax.losses.policy import action_logps, action_logps_and_entropy
from sftjax.losses.ppo import Played
from sftjax.losses.tokens import Forward
from sftjax.tasks.critics import Judge, add_value, value_of
from sftjax.tasks.grpo import cut
from sftjax.tasks.job import Job
from sftjax.tasks.reference import reference
from sftjax.tasks.rewards import Rewards
from sftjax.tasks.rollouts import Actor, figures, in_parts, named, summary
from sftjax.train.step import State, Step, make_step, over_minibatches


def train(config: ConfigDict, workdir: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Runs the task, or resumes it; returns what summary.json holds. Raises UserError and Stopped."""
    c, judges = config.ppo, list[Judge]()

    def judge(directory: str) -> Judge:
        judges.append(Judge(directory))
        return judges[-1]

    rewards = Rewards(c.rewards, c.reward_weights, key="ppo.rewards", model=judge)
    if c.value == "reward" and len(judges) != 1:
        raise UserError(f"--config.ppo.value=reward: needs one reward model in ppo.rewards, which has {len(judges)}")
    cut(config)  # refused before anything is read
    job = Job(config, workdir, force=force)
    refer: Any = reference(job)
    for one in judges:
        one.sits(job)
    value = value_of(add_value(job, judges[0] if starts_as_judge(config, len(judges)) else None))
    actor = Actor(job, c, rewards)
    look = in_parts(job, views(actor.forward, refer, value))
    learn = partial(step_of, config, loss_of(c, actor.forward, value))

    def collect(step: int, state: State, prompts: np.ndarray) -> tuple[Played, dict[str, float]]:
        began = time.perf_counter()
        params = tree.join(state.trainable, job.frozen)
        answers = actor.sample(params, job.splits.train, prompts.tolist(), step)
        sampled = time.perf_counter()
        scores, each = rewards(answers)
        stopped = jnp.array([a.stopped for a in answers])
        earned = ppo.earned(
            jnp.asarray(scores, jnp.float32), stopped, clip=c.score_clip, missing_eos_penalty=c.missing_eos_penalty
        )
        batch = actor.batch(answers)
        played = Played(*batch, **look(params, batch), scores=jax.device_get(ppo.at_the_end(earned, batch.weights)))
        shown = {"reward": float(scores.mean()), "reward_std": float(scores.std()), **named(each)}
        seconds = {"seconds/rollout": sampled - began, "seconds/score": time.perf_counter() - sampled}
        return hosts.own(played, job.mesh), shown | figures(answers) | seconds

    updates = c.num_ppo_epochs * c.num_mini_batches
    params, tally = job.iterate(learn, actor.evaluate, collect=collect, updates=updates, kept=jnp.float32(c.kl_coef))
    return job.finish(tally, extra=summary(job, tally), samples=actor.samples(params))


def starts_as_judge(config: ConfigDict, judges: int) -> bool:
    """Whether the value goes on from a reward model, of so many."""
    return judges == 1 and config.method != "freeze" and config.ppo.value != "base"


def loss_of(c: ConfigDict, policy: Forward, value: Forward) -> Loss:
    """By config.ppo, over a policy at its temperature and a value."""
    return ppo.ppo(policy, value, cliprange=c.cliprange, cliprange_value=c.cliprange_value, vf_coef=c.vf_coef)


def step_of(config: ConfigDict, loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """All updates of a step's answers."""
    c = config.ppo
    step = make_step(loss, optimizer, seed=config.seed, micro_batches=cut(config), clip=config.optim.clip)
    return iteration(over_minibatches(step, seed=config.seed, epochs=c.num_ppo_epochs, minibatches=c.num_mini_batches), c)


def iteration(update: Step, c: ConfigDict) -> Step:
    """`(state, frozen, Played) -> (state, metrics)`: what the actions were worth, then `update` by it, then the next kl_coef.

    `state.kept` is kl_coef, which the answers pay by; the next depends on how far from the reference these ones were.
    """

    def step(state: State, frozen: Any, played: Played) -> tuple[State, dict[str, Array]]:
        learnt, seen = ppo.experience(
            played,
            state.kept,
            kl_estimator=c.kl_estimator,
            gamma=c.gamma,
            lam=c.lam,
            whiten_rewards=c.whiten_rewards,
            whiten_advantages=c.whiten_advantages,
        )
        coefficient, rows = state.kept, played.tokens.shape[0]
        state, metrics = update(state, frozen, learnt)
        after = ppo.next_coefficient(coefficient, seen["kl"], target=c.kl_target, horizon=c.kl_horizon, answers=rows)
        return state._replace(kept=after), metrics | seen | {"kl_coef": coefficient}

    return step


def views(policy: Forward, refer: Callable[[Any], Any], value: Forward) -> Callable[[Any, Batch], dict[str, Array]]:
    """`(params, Batch) -> {"logps", "entropy", "reference", "values"}`, each [B, T]: the policy's, the reference's and the
    value's view of every action."""

    def look(params: Any, batch: Batch) -> dict[str, Array]:
        logps, entropy = action_logps_and_entropy(policy, params, batch)
        reference, values = action_logps(policy, refer(params), batch), ppo.state_values(value, params, batch)
        return {"logps": logps, "entropy": entropy, "reference": reference, "values": values}

    return look
