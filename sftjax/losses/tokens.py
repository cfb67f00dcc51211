"""Masked cross entropy and log-probs over a vocabulary, without whole logits.

    -log softmax(h_{t-1} @ head)[x_t], summed over the tokens that count

The head is applied to blocks of tokens. The cross entropy's gradient is made in the forward pass, block by block while
its logits are there, since the cotangent of a sum is one number; nothing is computed twice. Log-probs, whose cotangent
differs from token to token, recompute a block's logits in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax import sharding
from sftjax.data.batch import Batch
from sftjax.models.decoder import Output
from sftjax.models.moe import Routed
from sftjax.weights import kinds

Forward = Callable[..., Output]
Loss = Callable[[Any, Batch, Array | None], tuple[Array, Array, dict[str, Array]]]

# Logits at a time on a device. Few stay in a CPU's caches; an accelerator reads the whole head for each block, and needs rows
# enough to be busy meanwhile: of a vocabulary of 128k these are 32 and 500 tokens. A head that trains has a float32 gradient
# [D, V], which every block reads and writes, so its blocks are four times as large.
BLOCK, WIDE = 2**22, 2**26


def masked_xent(forward: Forward, *, label_smoothing: float = 0.0, z_loss: float = 0.0, router_balance: float = 0.0) -> Loss:
    """`(params, batch, key) -> (sum, count, {"nll": sum})`: sums over the batch, to be divided once.

    Token t counts `batch.weights[t]` times and is predicted from the token before it in its segment. The loss is
    (1 - s) * nll + s * mean over the vocabulary of -log p, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5), plus
    router_balance times `balance` of a mixture's routers, which is taken over the rows of one call and so, alone of all
    that is here, depends on how a batch is cut.
    """

    def loss(params: Any, batch: Batch, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        hidden, head, routed = forward(params, batch, key)
        targets, weights = shift(batch)
        total, nll = _xent(label_smoothing, z_loss, hidden, head, targets, weights)
        metrics = {"nll": jax.lax.stop_gradient(nll)}
        if router_balance:
            assert routed is not None, "router_balance: the model has no experts"
            uneven = weights.sum() * balance(routed)
            total += router_balance * uneven
            metrics["router_balance"] = jax.lax.stop_gradient(uneven)
        return total, weights.sum(), metrics

    return loss


def balance(routed: Routed) -> Array:
    """E * sum_e f_e p_e, f_e the share of all layers' tokens that had expert e, p_e its mean probability; even routers give k.

    arXiv:2101.03961, eq. 4.
    """
    layers_tokens = jnp.maximum(routed.tokens.sum(), 1)
    f, p = (x.sum(0) / layers_tokens for x in (routed.chosen, routed.probs))
    return f.shape[0] * (f * p).sum()


def shift(batch: Batch) -> tuple[Array, Array]:
    """Targets and weights [B, T] by the position that predicts them: position t predicts token t + 1."""
    targets = jnp.roll(batch.tokens, -1, axis=1)
    same = (batch.segments == jnp.roll(batch.segments, -1, axis=1)) & (batch.segments > 0)
    same = same.at[:, -1].set(False)
    return targets, jnp.where(same, jnp.roll(batch.weights, -1, axis=1), 0.0)


def logprobs(hidden: Array, head: kinds.Weight, targets: Array) -> Array:
    """log softmax(hidden @ head)[targets], [B, T] float32. hidden [B, T, D], head [D, V]."""

    @jax.checkpoint
    def block(h: Array, t: Array) -> Array:
        logits = kinds.logits(h, head)
        return jnp.take_along_axis(logits, t[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)

    return joined(jax.lax.map(lambda x: block(*x), blocks(head.shape[-1], hidden, targets)), targets.shape[1])


def blocks(vocab: int, *arrays: Array, trains: bool = False) -> tuple[Array, ...]:
    """Each [B, T, ...] as [n, B, t, ...]: along T, so that a sharded batch stays where it is. Padded with zeros.

    Of rows that are split over devices each block has a piece of every part, so that all devices work at all blocks.
    """
    B, T = arrays[0].shape[:2]
    parts = sharding.columns(T)
    T //= parts  # of one part
    t = max(1, min(T, block_size(trains) * sharding.logit_shards() // (B * vocab)))
    n = -(-T // t)
    t = -(-T // n)

    def cut(x: Array) -> Array:
        rest = x.shape[2:]
        x = jnp.pad(x.reshape(B, parts, T, *rest), [(0, 0), (0, 0), (0, n * t - T)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(B, parts, n, t, *rest), 2, 0).reshape(n, B, parts * t, *rest)

    return tuple(cut(x) for x in arrays)


def block_size(trains: bool = False) -> int:
    """Logits at a time on a device, of a head that `trains` or does not."""
    return BLOCK if jax.default_backend() == "cpu" else 4 * WIDE if trains else WIDE


def joined(x: Array, T: int) -> Array:
    """[B, T, ...] of what `blocks` has cut into [n, B, t, ...]."""
    n, B, t, *rest = x.shape
    parts = sharding.columns(T)
    x = jnp.moveaxis(x.reshape(n, B, parts, t // parts, *rest), 0, 2).reshape(B, parts, n * t // parts, *rest)
    return x[:, :, : T // parts].reshape(B, T, *rest)


def _block_sums(
    label_smoothing: float, z_loss: float, h: Array, head: kinds.Weight, targets: Array, weights: Array
) -> tuple[Array, Array]:
    logits = kinds.logits(h, head)
    lse = jax.nn.logsumexp(logits, -1)  # float32: a sum of 100k exponentials
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
    return (weights * loss).sum(), (weights * nll).sum()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _xent(
    label_smoothing: float, z_loss: float, hidden: Array, head: kinds.Weight, targets: Array, weights: Array
) -> tuple[Array, Array]:
    def block(sums, xs):
        h, t, w = xs
        loss, nll = _block_sums(label_smoothing, z_loss, h, head, t, w)
        return (sums[0] + loss, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(block, (zero, zero), blocks(head.shape[-1], hidden, targets, weights))[0]


def _xent_fwd(label_smoothing, z_loss, hidden, head, targets, weights):
    flags = jax.tree.map(lambda x: x.perturbed, head)
    hidden, head, targets, weights = jax.tree.map(lambda x: x.value, (hidden, head, targets, weights))
    leaves, structure = jax.tree_util.tree_flatten(head)
    trained = [i for i, flag in enumerate(jax.tree.leaves(flags)) if flag]  # a frozen head gets no gradient

    def block(carry, xs):
        loss, nll, grads = carry
        h, t, w = xs

        def sums(h, parts):
            whole = list(leaves)
            for i, part in zip(trained, parts):
                whole[i] = part
            return _block_sums(label_smoothing, z_loss, h, jax.tree.unflatten(structure, whole), t, w)

        block_loss, pull, block_nll = jax.vjp(sums, h, [leaves[i] for i in trained], has_aux=True)
        dh, dparts = pull(jnp.ones((), jnp.float32))
        grads = [g + d.astype(jnp.float32) for g, d in zip(grads, dparts)]
        return (loss + block_loss, nll + block_nll, grads), dh

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, [jnp.zeros(leaves[i].shape, jnp.float32) for i in trained])
    (loss, nll, grads), dh = jax.lax.scan(block, start, blocks(head.shape[-1], hidden, targets, weights, trains=bool(trained)))
    dhidden = joined(dh, hidden.shape[1])
    dhead: list[Any] = [None] * len(leaves)
    for i, g in zip(trained, grads):
        dhead[i] = g.astype(leaves[i].dtype)
    return (loss, nll), (dhidden, jax.tree.unflatten(structure, dhead) if trained else None, head)


def _xent_bwd(label_smoothing, z_loss, residuals, cotangents):
    dhidden, dhead, head = residuals
    g = cotangents[0]

    def scaled(d, like):
        return jnp.zeros_like(like) if d is None else (g * d).astype(d.dtype)

    if dhead is None:
        dhead = jax.tree.map(lambda _: None, head)
    dhead = jax.tree.map(scaled, dhead, head, is_leaf=lambda x: x is None)
    return (g * dhidden).astype(dhidden.dtype), dhead, None, None


_xent.defvjp(_xent_fwd, _xent_bwd, symbolic_zeros=True)
