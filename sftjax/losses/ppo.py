"""PPO on language models: what an answer earned becomes each token's advantage, and clipped steps follow it. arXiv:1707.06347.

    state    s_t   the prompt and the answer so far        policy     pi(a | s), the model that is trained
    action   a_t   the next token                          reference  pi_ref, the model as training began
    reward   r_t   -coef * KL_t(pi || pi_ref), and with the last action the answer's score: arXiv:1909.08593, eq. 2
    value    V(s)  the rewards that are still to come, as a score head on the same base sees it
    return   G_t   what did come, r_t + gamma r_{t+1} + ...: here advantage + value
    advantage A_t  how much better a_t was than what V expected: `policy.gae`

An iteration: `experience` says of every action what it was worth; `ppo` is the loss of a minibatch, and train.step's
`over_minibatches` goes over all of them several times. The policy stays near the one that acted, pi_old, since there is nothing
to gain beyond a ratio pi / pi_old of 1 +- cliprange.

Arrays are [B, T], an answer a row and token t's in column t: logps[t] = log pi(a_t | s_t), values[t] = V(s_t), of the state in
which t was chosen and which ends with token t - 1. `mask` is 1 where the policy chose the token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.losses.policy import action_logps, adapt, clipped_policy, clipped_value, divergence, gae, whiten
from sftjax.losses.tokens import Forward, Loss
from sftjax.models.heads import token_scores

Metrics = dict[str, Array]


class Played(NamedTuple):
    """A Batch of prompts with their answers, whose weights are 1 where the policy chose the token, and what came of them.

    All [B, T]; what stands where no token was chosen means nothing.
    """

    tokens: Any
    weights: Any
    segments: Any
    positions: Any
    logps: Any  # log pi_old(a_t | s_t), of the policy that acted
    entropy: Any  # of pi_old( . | s_t)
    reference: Any  # log pi_ref(a_t | s_t)
    values: Any  # V(s_t)
    scores: Any  # the answer's, with its last action; else 0


class Experience(NamedTuple):
    """A Batch whose weights are the mask of actions, and what each of them was worth."""

    tokens: Array
    weights: Array
    segments: Array
    positions: Array
    logps: Array
    values: Array
    advantages: Array
    returns: Array


def state_values(forward: Forward, params: Any, batch: Any, key: Array | None = None) -> Array:
    """V(s_t), [B, T], of the state that ends with the token before: what the head makes of that token."""
    return jnp.roll(token_scores(forward(params, batch, key))[..., 0], 1, axis=1)


def earned(scores: Array, stopped: Array, *, clip: float | None = None, missing_eos_penalty: float = 0.0) -> Array:
    """Scores [B] held within +-`clip`, less the penalty where the answer was cut off before it had `stopped` [B]."""
    held = scores if clip is None else jnp.clip(scores, -clip, clip)
    return held - missing_eos_penalty * (1 - stopped.astype(jnp.float32))


def at_the_end(scores: Array, mask: Array) -> Array:
    """[B] -> [B, T]: each answer's score with its last action."""
    return mask * (1 - jnp.roll(mask, -1, axis=1).at[:, -1].set(0)) * scores[:, None]


def experience(
    played: Played,
    coefficient: Array | float,
    *,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[Experience, Metrics]:
    """What is learnt from, and what it looked like: r_t is the score with the last action, less `coefficient` times KL_t.

    Whitened rewards keep their mean, as in arXiv:1909.08593's own code and TRL; advantages do not. Metrics:

        kl                  the sum over an answer's actions of log pi_old - log pi_ref, mean over answers
        entropy             of pi_old, mean over actions
        return              what an answer earned in all, its distance from the reference paid for, mean over answers
        explained_variance  of the returns by the values: 1 - Var(G - V) / Var(G), 1 where V knew it all
    """
    *batch, logps, entropy, reference, values, scores = played
    mask = (played.weights > 0).astype(jnp.float32)
    # what is no action is out before it is computed with: 0 times an infinity would be nan
    logps, entropy, reference, values = (jnp.where(mask > 0, x, 0) for x in (logps, entropy, reference, values))
    rewards = mask * (scores - coefficient * divergence(logps, reference, kl_estimator))
    n, answers = jnp.maximum(mask.sum(), 1), jnp.maximum((mask.sum(1) > 0).sum(), 1)
    paid = rewards.sum() / answers
    if whiten_rewards:
        rewards = whiten(rewards, mask) + mask * rewards.sum() / n
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    metrics = {
        "kl": (mask * (logps - reference)).sum() / answers,
        "entropy": entropy.sum() / n,
        "return": paid,
        "explained_variance": 1 - spread(returns - values, mask) / jnp.maximum(spread(returns, mask), 1e-8),
    }
    if whiten_advantages:
        advantages = whiten(advantages, mask)
    tokens, _, segments, positions = batch
    return Experience(tokens, mask, segments, positions, logps, values, advantages, returns), metrics


def spread(x: Array, mask: Array) -> Array:
    """The variance of x over the mask."""
    n = jnp.maximum(mask.sum(), 1)
    return (mask * jnp.square(x - (mask * x).sum() / n)).sum() / n


def ppo(policy: Forward, value: Forward, *, cliprange: float = 0.2, cliprange_value: float = 0.2, vf_coef: float = 0.1) -> Loss:
    """`(params, Experience, key) -> (sum, actions, metrics)`: the policy's clipped loss and vf_coef times the value's.

    Metrics are sums over actions: policy_loss, value_loss, clip_fraction and value_clip_fraction (the share of actions from
    which the step learns nothing more), and approx_kl, the distance so far from the policy that acted.
    """

    def loss(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, Metrics]:
        mask = batch.weights
        logps, values = (
            jnp.where(mask > 0, x, 0) for x in (action_logps(policy, params, batch, key), state_values(value, params, batch, key))
        )
        of_policy, clipped = clipped_policy(logps, batch.logps, batch.advantages, low=cliprange, high=cliprange)
        of_value = clipped_value(values, batch.values, batch.returns, clip=cliprange_value)
        held = of_value > 0.5 * jnp.square(values - batch.returns)
        total = (mask * (of_policy + vf_coef * of_value)).sum()
        shown = {
            "policy_loss": of_policy,
            "value_loss": of_value,
            "clip_fraction": clipped,
            "value_clip_fraction": held,
            "approx_kl": divergence(logps, batch.logps, "k2"),
        }
        metrics = {name: jax.lax.stop_gradient((mask * x).sum()) for name, x in shown.items()}
        return total, mask.sum(), metrics

    return loss


def next_coefficient(coefficient: Array, kl: Array, *, target: float | None, horizon: float, answers: int) -> Array:
    """Of the KL penalty: as it is, or with a target as `policy.adapt` has it."""
    return coefficient if target is None else adapt(coefficient, kl, target=target, horizon=horizon, n=answers)
