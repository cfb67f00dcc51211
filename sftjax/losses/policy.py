"""Learning from rewards: advantages of what a policy did, and the clipped losses that make it do more of the better.

    state    s_t   the prompt and the answer so far          action   a_t   the token that comes next, from pi( . | s_t)
    reward   r_t   what an action earns                      return   G_t   sum over k of gamma^k r_{t+k}
    value    V(s)  the return to be expected from a state    advantage A_t  how much better the action was than that

Here every action of an answer but its last earns nothing, or its distance from the reference; the last earns the answer's
reward. PPO (arXiv:1707.06347) learns V beside the policy. GRPO (arXiv:2402.03300) and RLOO (arXiv:2402.14740) ask several
answers of each prompt instead, and hold each against the others. Arrays are [B, T], token t's in column t; `mask` is 1 where
the policy chose the token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.losses.tokens import Forward, Loss, blocks, joined, logprobs, shift
from sftjax.models.decoder import Output
from sftjax.weights import kinds

EPS = 1e-4  # in a group's spread: of answers that all earn the same, none is better


class Rollouts(NamedTuple):
    """A Batch of what a policy did and what came of it."""

    tokens: Any
    weights: Any  # what an action's loss is multiplied with ...
    segments: Any
    positions: Any
    counts: Any  # ... and what it adds to the number that the sum is divided by: `normalised`
    logps: Any  # log pi_old(a_t | s_t), of the policy that chose
    advantages: Any
    reference: Any  # log pi_ref(a_t | s_t)


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Array, Array]:
    """(advantages, returns): A_t = sum over k of (gamma * lam)^k delta_{t+k}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t).

    arXiv:1506.02438, eq. 16. values[t] is V of the state in which action t was chosen; after the last action there is no
    state. Returns are advantages + values. An answer's actions stand side by side; all is zero where `mask` is.
    """

    def back(later: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage, value = later
        r, v, m = now
        delta = r + gamma * value - v
        advantage = m * (delta + gamma * lam * advantage)
        return (advantage, m * v), advantage

    zero = jnp.zeros(rewards.shape[0], jnp.float32)
    columns = rewards.T, values.T, mask.T
    advantages = jax.lax.scan(back, (zero, zero), columns, reverse=True)[1].T
    return advantages, mask * (advantages + values)


def whiten(x: Array, mask: Array) -> Array:
    """x with mean 0 and variance 1 over the mask, and 0 outside it."""
    n = jnp.maximum(mask.sum(), 1)
    mean = (mask * x).sum() / n
    variance = (mask * jnp.square(x - mean)).sum() / n
    return mask * (x - mean) * jax.lax.rsqrt(variance + 1e-8)


def group_advantages(rewards: Array, *, scale: str = "group") -> Array:
    """GRPO: rewards [P, G] of G answers to each of P prompts, less their prompt's mean, by their prompt's spread. -> [P, G]

    scale   group  the standard deviation of the prompt's answers, arXiv:2402.03300, section 4.1.2
            batch  of all answers
            none   1: easy and hard prompts count alike, Dr. GRPO, arXiv:2503.20783
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    if scale == "none":
        return centred
    spread = rewards.std(1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    return centred / (spread + EPS)


def leave_one_out(rewards: Array) -> Array:
    """RLOO: rewards [P, G], each less the mean of the prompt's others, arXiv:2402.14740, eq. 8. -> [P, G]"""
    G = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * G / (G - 1)


def normalised(mask: Array, by: str, *, longest: int) -> tuple[Array, Array]:
    """(weights, counts) of actions, [B, T]: the loss is sum(weights * loss) / sum(counts).

    by   grpo     the mean over answers of each one's mean over its tokens, arXiv:2402.03300
         dapo     the mean over all tokens, arXiv:2503.14476
         dr_grpo  the sum over tokens by the longest that an answer may be, averaged over answers, arXiv:2503.20783
    """
    share = mask / jnp.maximum(mask.sum(1, keepdims=True), 1)  # of its answer
    return {"grpo": (share, share), "dapo": (mask, mask), "dr_grpo": (mask / longest, share)}[by]


def divergence(logps: Array, reference: Array, kind: str) -> Array:
    """Each token's estimate of KL(pi || pi_ref), from one sample. http://joschu.net/blog/kl-approx.html

    k1  log pi - log pi_ref              without bias, and may be negative
    k2  half its square                  its gradient is that of the divergence
    k3  1/ratio - 1 + log ratio          without bias, never negative
    """
    ahead = logps - reference
    return {"k1": ahead, "k2": 0.5 * jnp.square(ahead), "k3": jnp.expm1(-ahead) + ahead}[kind]


def clipped_policy(logps: Array, old: Array, advantages: Array, *, low: float = 0.2, high: float = 0.2) -> tuple[Array, Array]:
    """(loss, was it clipped) of each action: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = pi / pi_old.

    arXiv:1707.06347, eq. 7; `high` above `low` is DAPO's clip-higher, arXiv:2503.14476, eq. 10.
    """
    ratio = jnp.exp(logps - old)
    free, held = ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return -jnp.minimum(free, held), held < free


def clipped_value(values: Array, old: Array, returns: Array, *, clip: float = 0.2) -> Array:
    """Half the square of what is farther from the return: the value, or the value held within `clip` of the old."""
    held = old + jnp.clip(values - old, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(held - returns))


def adapt(coefficient: Array | float, kl: Array | float, *, target: float, horizon: float, n: int) -> Array:
    """The KL penalty's next coefficient: up where the policy is farther from the reference than `target`, else down.

    arXiv:1909.08593, section 2.2; `n` answers were made since the last.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * n / horizon)


def tempered(forward: Forward, temperature: float) -> Forward:
    """The forward of the policy that samples at this temperature: its logits, divided.

    They are linear in what comes before the head, but for a soft cap, which is divided too:
    cap * tanh(x @ W / cap) / t = (cap / t) * tanh((x / t) @ W / (cap / t)).
    """

    def run(params: Any, batch: Any, key: Array | None = None) -> Output:
        output = forward(params, batch, key)
        head = output.head
        if isinstance(head, kinds.Capped):
            head = kinds.Capped(head.base, head.cap / temperature)
        return output._replace(hidden=output.hidden / temperature, head=head)

    return forward if temperature == 1 else run


def logps_and_entropy(hidden: Array, head: kinds.Weight, targets: Array) -> tuple[Array, Array]:
    """log softmax(hidden @ head)[targets], and the entropy in nats, for looking alone: both [B, T], without whole logits."""

    @jax.checkpoint
    def block(h: Array, t: Array) -> tuple[Array, Array]:
        logits = kinds.logits(h, head)
        lse = jax.nn.logsumexp(logits, -1)
        fixed = jax.lax.stop_gradient(logits - lse[..., None])
        return jnp.take_along_axis(logits, t[..., None], -1)[..., 0] - lse, -(jnp.exp(fixed) * fixed).sum(-1)

    out = jax.lax.map(lambda x: block(*x), blocks(head.shape[-1], hidden, targets))  # [n, B, t]
    logps, entropy = (joined(x, targets.shape[1]) for x in out)
    return logps, entropy


def action_logps(forward: Forward, params: Any, batch: Any, key: Array | None = None) -> Array:
    """log pi(a_t | s_t), [B, T]; what stands where no token was chosen means nothing."""
    output = forward(params, batch, key)
    return jnp.roll(logprobs(output.hidden, output.head, shift(batch)[0]), 1, axis=1)


def action_logps_and_entropy(forward: Forward, params: Any, batch: Any) -> tuple[Array, Array]:
    """The same beside the entropy of pi( . | s_t) in nats."""
    output = forward(params, batch)
    logps, entropy = logps_and_entropy(output.hidden, output.head, shift(batch)[0])
    return jnp.roll(logps, 1, axis=1), jnp.roll(entropy, 1, axis=1)


def grpo(forward: Forward, *, low: float = 0.2, high: float = 0.2, beta: float = 0.0, fresh: bool = False) -> Loss:
    """`(params, Rollouts, key) -> (sum, count, metrics)`: the clipped loss, and `beta` times the distance from the reference, k3.

    `fresh`: the answers are this very policy's, so pi_old is pi, and `batch.logps` is not read. Metrics: clip_fraction,
    approx_kl from pi_old, entropy, and with a beta kl, from the reference.
    """

    def loss(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        output = forward(params, batch, key)
        targets, weights = shift(batch)
        logps, entropy = logps_and_entropy(output.hidden, output.head, targets)

        def predicted(x: Array) -> Array:  # by the position that predicts the token
            return jnp.roll(x, -1, axis=1)

        # what is no action is out before it is computed with: 0 times an infinity would be nan
        acts = weights > 0
        before = jax.lax.stop_gradient(logps) if fresh else predicted(batch.logps)
        logps, old, reference = (jnp.where(acts, x, 0) for x in (logps, before, predicted(batch.reference)))
        counts, advantages = jnp.where(acts, predicted(batch.counts), 0), predicted(batch.advantages)
        each, clipped = clipped_policy(logps, old, advantages, low=low, high=high)
        apart = divergence(logps, reference, "k3")
        total = (weights * (each + beta * apart)).sum()
        n = counts.sum()
        shown = {"clip_fraction": clipped.astype(jnp.float32), "approx_kl": divergence(logps, old, "k2"), "entropy": entropy}
        shown |= {"kl": apart} if beta else {}
        metrics = {name: jax.lax.stop_gradient(jnp.where(acts, counts * x, 0).sum()) for name, x in shown.items()}
        return total, n, metrics

    return loss
