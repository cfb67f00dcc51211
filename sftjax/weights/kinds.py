"""What stands where a kernel stood. Every kind is a pytree node; `matmul` is the one place that knows them.

    array               [..., in, out]
    LowRank             base + scale * a @ b        LoRA, arXiv:2106.09685

The base comes first in every node and may itself be a kind: `lora(quantize(params))` is QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Weight = Any  # Array | LowRank


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True)
class LowRank:
    """x @ base + scale * (dropout(x) @ a) @ b, with base [..., in, out], a [..., in, r], b [..., r, out]."""

    base: Weight
    a: Array
    b: Array
    scale: float
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def axes(self, kernel: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the parts, from the kernel's: the rank is whole everywhere."""
        *lead, fan_in, fan_out = kernel
        return {"base": kernel, "a": (*lead, fan_in, None), "b": (*lead, None, fan_out)}


def matmul(x: Array, w: Weight, key: Array | None = None) -> Array:
    """x [..., in] @ w [in, out] -> [..., out] in x's dtype. `key` turns on the dropout that the weight asks for."""
    match w:
        case LowRank(dropout=rate) if rate and key is not None:
            kept = jax.random.bernoulli(key, 1 - rate, x.shape)
            dropped = jnp.where(kept, x / (1 - rate), 0)
            return matmul(x, w.base) + w.scale * matmul(matmul(dropped, w.a), w.b)
        case LowRank(base=jax.Array()) if x.dtype == jnp.float32 and x.size > 4 * w.base.size:
            return _low_rank_matmul(w.scale, x, w.base, w.a, w.b)
        case LowRank():
            return matmul(x, w.base) + w.scale * matmul(matmul(x, w.a), w.b)
        case _:
            return _product(x, w.astype(x.dtype))


def dense(w: Weight, dtype: Any = None) -> Array:
    """The one matrix that `w` stands for, in `dtype` or the base's own. The sum is made in float32."""
    match w:
        case LowRank():
            base = dense(w.base)
            return (base.astype(jnp.float32) + w.scale * (w.a @ w.b).astype(jnp.float32)).astype(dtype or base.dtype)
        case _:
            return w if dtype is None else w.astype(dtype)


def transpose(w: Weight) -> Weight:
    """The weight of the transposed product: what a tied head makes of an embedding [V, D]."""
    match w:
        case LowRank():
            flip = partial(jnp.swapaxes, axis1=-1, axis2=-2)
            return LowRank(transpose(w.base), flip(w.b), flip(w.a), w.scale, w.dropout)
        case _:
            return jnp.swapaxes(w, -1, -2)


def rows(w: Weight, ids: Array) -> Array:
    """w[ids]: rows of an embedding [V, D] -> [..., D]."""
    match w:
        case LowRank():
            return rows(w.base, ids) + w.scale * (w.a[ids] @ w.b)
        case _:
            return w[ids]


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    """x @ w, whose gradient dw has the narrower of x and dy on the left: a CPU transposes that side in memory first."""
    return x @ w


def _product_fwd(x, w):
    return x @ w, (x, w)


def _product_bwd(residuals, dy):
    x, w = residuals
    lead = tuple(range(x.ndim - 1))
    wide = x.shape[-1] > dy.shape[-1]
    dw = jnp.tensordot(dy, x, (lead, lead)).T if wide else jnp.tensordot(x, dy, (lead, lead))
    return dy @ w.T, dw


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_matmul(scale: float, x: Array, base: Array, a: Array, b: Array) -> Array:
    """x @ (base + scale * a @ b). With many rows in x, adding the product to the base costs in * r * out once, where
    the two thin products cost rows * r * (in + out), forward and again backward. float32 only: in bfloat16 the sum
    would round the update away. The gradients are those of the two thin products; dW is never formed for a and b.
    """
    return x @ (base + scale * (a @ b))


def _low_rank_fwd(scale, x, base, a, b):
    return _low_rank_matmul(scale, x, base, a, b), (x, base, a, b)


def _low_rank_bwd(scale, residuals, dy):
    x, base, a, b = residuals
    dx = dy @ (base + scale * (a @ b)).T
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    da = scale * (x.T @ (dy @ b.T))
    db = scale * ((x @ a).T @ dy)
    return dx, (x.T @ dy).astype(base.dtype), da, db  # the base's is dropped by the compiler where the base is frozen


_low_rank_matmul.defvjp(_low_rank_fwd, _low_rank_bwd)
