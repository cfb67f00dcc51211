"""Reward models: the likelihood of preferences under rewards, -log P(what was preferred). The rewards are a scalar head's.

    Bradley-Terry     P(c > r) = sigmoid(r_c - r_r)                                      a pair
    Plackett-Luce     P(1 > 2 > ... > K) = prod_i exp(r_i) / sum_{j >= i} exp(r_j)       a ranking, the best drawn first

Only differences of rewards matter to either: a model's mean reward is free, and drifts unless it is centred.

A pair is two segments of one row, as for DPO (losses/dpo.py): 2i + 1 the chosen answer with its prompt, 2i + 2 the rejected
one. Of a ranking of up to K answers, best first, the k-th, from 0, is segment 2K i + 2k + 1, or 2K i + 2k + 2 where it is as
good as the one before it. The reward of a segment is its last token's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.losses.tokens import Forward, Loss
from sftjax.models.heads import segment_scores

Metrics = dict[str, Array]


def bradley_terry(chosen: Array, rejected: Array, *, margin: Array | float = 0.0, centring: float = 0.0) -> Array:
    """-log sigmoid(r_c - r_r - margin) + centring * (r_c + r_r)^2 of each pair, arXiv:2203.02155, eq. 1. Rewards [P].

    margin     by how much better the chosen answer was said to be, one for all or [P]: arXiv:2307.09288, eq. 2
    centring   holds the mean reward at zero, 0.01 is usual: arXiv:2312.09244
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * jnp.square(chosen + rejected)


def plackett_luce(rewards: Array, scores: Array, real: Array, *, centring: float = 0.0) -> Array:
    """-log P(the ranking) of each prompt, [P]; rewards, scores and real [P, K], the highest score being the best answer.

    Each answer is held against those that are worse. Equal scores make no statement, so two answers are Bradley-Terry's pair
    or, tied, nothing. Where `real` is false there is no answer. `centring` is of (2 * the mean reward)^2, a pair's own.
    """
    better = worse_than(scores, real)
    rivals = better | jnp.eye(scores.shape[1], dtype=bool)
    rewards = jnp.where(real, rewards, 0).astype(jnp.float32)
    total = jax.nn.logsumexp(jnp.broadcast_to(rewards[:, None, :], rivals.shape), axis=-1, where=rivals)
    mean = rewards.sum(-1) / jnp.maximum(real.sum(-1), 1)
    return (total - rewards).sum(-1) + centring * jnp.square(2 * mean)


def worse_than(scores: Array, real: Array) -> Array:
    """[P, K, K] bool: is answer j worse than answer i?"""
    return (scores[:, :, None] > scores[:, None, :]) & real[:, :, None] & real[:, None, :]


def rewards(forward: Forward, params: Any, batch: Any, count: int, key: Array | None = None) -> tuple[Array, Array]:
    """(rewards [B, S] float32, real [B, S] bool) of the segments 1 .. S = `count` of a Batch: the score of each one's last token.

    Pure, and for any Batch: with one sequence a row, `count` 1 gives PPO its rewards.
    """
    scores, real = segment_scores(forward(params, batch, key), batch.segments, count)
    return scores[..., 0], real


def pairwise(forward: Forward, *, margin: float = 0.0, centring: float = 0.0) -> Loss:
    """`(params, batch, key) -> (sum over pairs, pairs, metrics)` by Bradley-Terry.

    Metrics are sums over pairs: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies.
    """

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, Metrics]:
        chosen, rejected, real = pair_rewards(forward, params, batch, key)
        losses = bradley_terry(chosen, rejected, margin=margin, centring=centring)
        sums = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        sums |= {"accuracies": (1 + jnp.sign(chosen - rejected)) / 2}  # equal at the start of a run: half right
        shown = {f"rewards/{name}": jax.lax.stop_gradient(jnp.where(real, x, 0).sum()) for name, x in sums.items()}
        return jnp.where(real, losses, 0).sum(), real.sum().astype(jnp.float32), shown

    return run


def pair_rewards(forward: Forward, params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, Array]:
    """(of the chosen answers, of the rejected ones, is there such a pair), each [B, P]."""
    scored, real = rewards(forward, params, batch, batch.tokens.shape[1] // 2 * 2, key)
    return scored[:, 0::2], scored[:, 1::2], real[:, 0::2] & real[:, 1::2]


def listwise(forward: Forward, *, answers: int, centring: float = 0.0) -> Loss:
    """`(params, batch, key) -> (sum over rankings, rankings, metrics)` by Plackett-Luce, of at most `answers` answers each.

    Metrics are as `pairwise` has them, over the pairs that a ranking makes; each ranking's mean, so that all count alike.
    """

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, Metrics]:
        scored, scores, here = ranked_rewards(forward, params, batch, answers, key)
        losses = plackett_luce(scored, scores, here, centring=centring)
        better = worse_than(scores, here)
        real = better.any((-2, -1))
        ahead = scored[:, :, None] - scored[:, None, :]
        mean = partial(mean_of_pairs, better)
        shown = {
            "rewards/chosen": mean(jnp.broadcast_to(scored[:, :, None], ahead.shape)),
            "rewards/rejected": mean(jnp.broadcast_to(scored[:, None, :], ahead.shape)),
            "rewards/margins": mean(ahead),
            "rewards/accuracies": mean((1 + jnp.sign(ahead)) / 2),
        }
        shown = {name: jax.lax.stop_gradient(x.sum()) for name, x in shown.items()}
        return jnp.where(real, losses, 0).sum(), real.sum().astype(jnp.float32), shown

    return run


def ranked_rewards(
    forward: Forward, params: Any, batch: Any, answers: int, key: Array | None = None
) -> tuple[Array, Array, Array]:
    """(rewards, scores that fall with the rank, is there such an answer), each [P, K]; P = B times what a row could hold."""
    groups = batch.tokens.shape[1] // 2  # a ranking has two answers at least
    scored, real = rewards(forward, params, batch, groups * 2 * answers, key)
    scored, real = (x.reshape(-1, answers, 2) for x in (scored, real))  # the last axis: better than the one before, or as good
    return scored.sum(-1), -jnp.cumsum(real[..., 0], -1), real.any(-1)


def mean_of_pairs(better: Array, x: Array) -> Array:
    """[P, K, K] -> [P]: the mean where `better`."""
    return jnp.where(better, x, 0).sum((-2, -1)) / jnp.maximum(better.sum((-2, -1)), 1)


def pair_differences(forward: Forward, answers: int = 0) -> Callable[[Any, Any], tuple[Array, Array]]:
    """`(params, batch) -> (rewards of the better less the worse, is there such a pair)`, of pairs, or of all that rankings make.

    `answers` is how many a ranking has at most; 0 for a batch of pairs.
    """

    def run(params: Any, batch: Any) -> tuple[Array, Array]:
        if not answers:
            chosen, rejected, real = pair_rewards(forward, params, batch)
            return chosen - rejected, real
        scored, scores, here = ranked_rewards(forward, params, batch, answers)
        return scored[:, :, None] - scored[:, None, :], worse_than(scores, here)

    return run
