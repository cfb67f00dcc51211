"""Causal attention bounded by segments, without a [B, N, T, T] array forward or backward.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s    over s <= t, segment(s) = segment(t), t - s < window

A soft cap makes scores cap * tanh(score / cap) before the softmax (arXiv:2408.00118, section 2). A sink is a logit of its
head's own beside the scores, with nothing to say: what the softmax gives it no key gets (arXiv:2309.17453, section 3.3). With
lse the log-sum-exp of the scores alone, o becomes o * exp(lse) / (exp(lse) + exp(sink)), whichever way it was computed. On a
TPU `models.splash` does all this, on NVIDIA GPUs `models.flash` what cuDNN can. Elsewhere queries go in chunks, which see only
the keys before their own end (and within the window), so causality halves the work. The backward pass recomputes the
probabilities of a chunk from the saved log-sum-exp, as FlashAttention does (arXiv:2205.14135, algorithm 4). Long rows go as
`blocks` says; where a mesh splits rows, `_whole_rows` brings their parts together. Letters: B batch, T query, S key, N heads, K
kv heads, G = N / K, H head, C chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sftjax import sharding
from sftjax.config import UserError
from sftjax.models import blocks, flash
from sftjax.models.blocks import FAR, MASKED, How, backward_scores, capped, masked
from sftjax.models.splash import splash

LONG = 8192  # beyond so many positions rows go by `blocks`: chunks against all keys would be large


def attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    windows: tuple[int | None, ...] = (None,),
    which: Array | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """q [B, T, N, H], k and v [B, T, K, H], segments [B, T], sinks [N] -> [B, T, N, H] in q's dtype.

    A window counts the keys a query sees, its own included; None is all. `which` is the index of this layer's window. It is
    traced, so that one scan body serves layers of different windows; each is a branch of its own, which skips keys it can
    never see.
    """
    fn = partial({"tpu": _splash, "gpu": _flash}.get(jax.default_backend(), _attention), how=How(windows, scale, softcap))
    which = jnp.zeros((), jnp.int32) if which is None else which
    mesh = sharding.mesh_in_use()
    if mesh is None:
        return fn(q, k, v, segments, which, sinks)
    tensor, columns = mesh.shape[sharding.HEADS], sharding.columns(q.shape[1])
    check_heads(q.shape[2], k.shape[2], tensor, columns)
    # each device loops over its own rows and heads: a loop over a sharded axis would gather it
    tokens = P(sharding.BATCH, sharding.along(q.shape[1]))
    each = P(*tokens, sharding.HEADS, None)
    local = fn if columns == 1 else partial(_whole_rows, fn, columns)
    specs = (each, each, each, tokens, P(), P(sharding.HEADS))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)(q, k, v, segments, which, sinks)


def check_heads(heads: int, kv_heads: int, tensor: int, columns: int) -> None:
    """Refuses a mesh over whose axes heads do not divide, where the kernels' columns may."""
    if kv_heads % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the model's {kv_heads} key-value heads; "
            f"use --config.mesh.tensor={math.gcd(kv_heads, tensor)}"
        )
    if (of_each := heads // tensor) % columns:
        raise UserError(
            f"mesh.sequence={columns} does not divide the {of_each} heads that the model has by mesh.tensor={tensor}; "
            f"use --config.mesh.sequence={math.gcd(of_each, columns)}"
        )


def _whole_rows(
    fn: Callable[..., Array], columns: int, q: Array, k: Array, v: Array, segments: Array, which: Array, sinks: Array | None
) -> Array:
    """Attention of rows whose T positions lie on n devices, T/n on each: the devices exchange positions for heads.

        q [B, T/n, N, H]  ->  [B, T, N/n, H]  ->  fn, as on one device  ->  [B, T, N/n, H]  ->  [B, T/n, N, H]

    DeepSpeed-Ulysses, arXiv:2309.14509. So every kernel of attention serves as it is, with its segments and windows, all
    devices have the same share of the causal triangle, and what each holds falls with n. N must divide; K heads of keys and
    values that do not are gathered, and a device takes those of its own queries.
    """
    N, K = q.shape[2], k.shape[2]
    swap = partial(jax.lax.all_to_all, axis_name=sharding.SEQUENCE, tiled=True)
    q = swap(q, split_axis=2, concat_axis=1)
    if K % columns == 0:
        k, v = (swap(x, split_axis=2, concat_axis=1) for x in (k, v))
    else:
        own = math.gcd(N // columns, N // K)  # queries that are sure to share a head of keys
        queries = jax.lax.axis_index(sharding.SEQUENCE) * (N // columns) + jnp.arange(0, N // columns, own)
        whole = partial(jax.lax.all_gather, axis_name=sharding.SEQUENCE, axis=1, tiled=True)
        k, v = (whole(x)[:, :, queries * K // N] for x in (k, v))
    segments = jax.lax.all_gather(segments, sharding.SEQUENCE, axis=1, tiled=True)
    if sinks is not None:
        sinks = sinks.reshape(columns, -1)[jax.lax.axis_index(sharding.SEQUENCE)]
    return swap(fn(q, k, v, segments, which, sinks), split_axis=1, concat_axis=2)


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    *,
    windows: tuple[int | None, ...] = (None,),
    which: Array | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """q [B, T, N, H] at positions [B, T] against one layer of a cache, k [B, K, H, S] and v [B, K, S, H]; sinks [N].

    Slot s holds position s; what lies beyond a query's position is not seen.
    """
    B, T, N, H = q.shape
    K, S = v.shape[1:3]
    G = N // K
    window = jnp.asarray([FAR if w is None else w for w in windows])[0 if which is None else which]
    # one product a kv head over its G queries of all T positions: with T an axis of its own, the CPU transposes the results
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = capped(jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32) * scale, softcap)
    behind = positions[:, :, None] - jnp.arange(S)  # [B, T, S]
    seen = (behind >= 0) & (behind < window)
    scores = jnp.where(seen[:, None, None], scores.reshape(B, K, G, T, S), MASKED).reshape(B, K, G * T, S)
    top = scores.max(-1, keepdims=True)
    e = jnp.exp(scores - top)
    y = jnp.einsum("bkms,bksh->bkmh", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
    total = e.sum(-1, keepdims=True)
    y /= total
    if sinks is not None:
        y *= _heard(top + jnp.log(total), jnp.repeat(sinks, T).reshape(K, G * T, 1))
    return y.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(v.dtype)


def _heard(lse: Array, sink: Array) -> Array:
    """The share of the softmax that is left to the keys: exp(lse) / (exp(lse) + exp(sink)), float32."""
    return jax.nn.sigmoid(lse - sink.astype(jnp.float32))


def _splash(q: Array, k: Array, v: Array, segments: Array, which: Array, sinks: Array | None, *, how: How) -> Array:
    def run(window: int | None) -> Array:
        return splash(q, k, v, segments, sinks, window=window, scale=how.scale, softcap=how.softcap)

    return _in_window(how, which, run)


def _flash(q: Array, k: Array, v: Array, segments: Array, which: Array, sinks: Array | None = None, *, how: How) -> Array:
    if sinks is not None or not flash.serves(q, how):  # cuDNN knows no sinks
        return _attention(q, k, v, segments, which, sinks, how=how)
    whole = how._replace(windows=(None,))  # no window that it serves hides anything
    otherwise = lambda q, k, v, s: _attention(q, k, v, s, jnp.zeros((), jnp.int32), how=whole)  # noqa: E731
    return flash.flash(q, k, v, segments, scale=how.scale, otherwise=otherwise)


def _in_window(how: How, which: Array, run: Callable[[int | None], Any]) -> Any:
    """`run(window)` of the window that holds."""
    return jax.lax.switch(which, [partial(run, window) for window in how.windows])


def _attention(q: Array, k: Array, v: Array, segments: Array, which: Array, sinks: Array | None = None, *, how: How) -> Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    dtype = q.dtype
    if jax.default_backend() == "cpu":  # XLA has no products of bfloat16 into float32 there
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, H]
    of_heads = None if sinks is None else sinks.astype(jnp.float32).reshape(K, G)
    one = partial(_heads, how)

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:  # [K, G, T, H], [K, T, H], [T]
        return _each(lambda x: one(*x, segments, which), (q, k, v, of_heads))

    o = _each(lambda x: row(*x), (q, k, v, segments))
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(dtype)


def _each(fn, xs):
    # CPU: batched products run several times slower there than plain ones, and a head's scores stay in cache
    return jax.lax.map(fn, xs) if jax.default_backend() == "cpu" else jax.vmap(fn)(xs)


def _chunks(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, first key, end) of each chunk of queries: keys outside [first key, end) are never seen."""
    C = max(128, -(-T // 16))
    starts = range(0, T, C)
    return [(t, max(0, t - window + 1) if window else 0, min(t + C, T)) for t in starts]


def _scores(how: How, window: int | None, q: Array, k: Array, segments: Array, t: int, s: int, end: int) -> Array:
    """Masked scores of queries t:end against keys s:end, [G, C, S] float32."""
    at = jnp.arange(t, end), jnp.arange(s, end)
    return masked(how, window, q[:, t:end], k[s:end], segments[t:end], segments[s:end], *at)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads(how, q, k, v, sinks, segments, which):
    """One kv head and its G query heads: q [G, T, H], k and v [T, H], sinks [G] or None -> [G, T, H]."""
    return _heads_fwd(how, q, k, v, sinks, segments, which)[0]


def _heads_fwd(how, q, k, v, sinks, segments, which):
    o, lse = _in_window(how, which, lambda window: _forward(how, window, q, k, v, segments))
    if sinks is not None:
        sink = sinks[:, None, None]
        o, lse = (o * _heard(lse, sink)).astype(o.dtype), jnp.logaddexp(lse, sink)
    q, k, v, o, lse = checkpoint_name((q, k, v, o, lse), "attention")
    return o, (q, k, v, sinks, segments, which, o, lse)


def _forward(how, window, q, k, v, segments):
    """The output and log-sum-exp of every query."""
    if q.shape[1] > LONG:
        return blocks.forward(how, window, q, k, v, segments)
    outs: list[Array] = []
    lses: list[Array] = []
    for t, s, end in _chunks(q.shape[1], window):
        q, outs = jax.lax.optimization_barrier((q, outs))  # a chunk after the other: together their scores would be [T, T]
        scores = _scores(how, window, q, k, segments, t, s, end)
        top = scores.max(-1, keepdims=True)
        e = jnp.exp(scores - top)
        total = e.sum(-1, keepdims=True)
        outs.append(
            (jnp.einsum("gts,sh->gth", e.astype(v.dtype), v[s:end], preferred_element_type=jnp.float32) / total).astype(q.dtype)
        )
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _heads_bwd(how, residuals, do):
    q, k, v, sinks, segments, which, o, lse = residuals
    gradients = _in_window(how, which, lambda window: _backward(how, window, q, k, v, segments, o, lse, do))
    dsinks = None
    if sinks is not None:  # its value is zero, so that of its score's gradient p * (0 - delta) is left
        dsinks = -(jnp.exp(sinks[:, None, None] - lse) * _delta(o, do)).sum((1, 2))
    return *gradients, dsinks, None, None


def _delta(o, do):
    return jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)  # [G, T, 1]


def _backward(how, window, q, k, v, segments, o, lse, do):
    """dq, dk and dv."""
    delta = _delta(o, do)
    if q.shape[1] > LONG:
        return blocks.backward(how, window, q, k, v, segments, lse, delta, do)
    # dk and dv are [H, T] until the end: as [T, H] they would have a CPU transpose the scores, not the queries
    dq, dk, dv = [], jnp.zeros(k.T.shape, jnp.float32), jnp.zeros(v.T.shape, jnp.float32)
    for t, s, end in _chunks(q.shape[1], window):
        q, k, do, dk, dv = jax.lax.optimization_barrier((q, k, do, dk, dv))
        scores = _scores(how, window, q, k, segments, t, s, end)
        p, ds = backward_scores(how, scores, lse[:, t:end], delta[:, t:end], do[:, t:end], v[s:end])
        ds = ds.astype(q.dtype)
        dq.append(jnp.einsum("gts,sh->gth", ds, k[s:end]))
        dk = dk.at[:, s:end].add(jnp.einsum("gth,gts->hs", q[:, t:end], ds, preferred_element_type=jnp.float32))
        dv = dv.at[:, s:end].add(jnp.einsum("gth,gts->hs", do[:, t:end], p.astype(do.dtype), preferred_element_type=jnp.float32))
    return jnp.concatenate(dq, 1), dk.T.astype(k.dtype), dv.T.astype(v.dtype)


_heads.defvjp(_heads_fwd, _heads_bwd)
