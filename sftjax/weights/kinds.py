"""What stands where a kernel stood. Every kind is a pytree node; `matmul` is the one place that knows them.

    array        [..., in, out]
    LowRank      base + scale * a @ b                                  LoRA, arXiv:2106.09685
    Dora         magnitude * V / |V| by column, V a LowRank            DoRA, arXiv:2402.09353
    Nf4, Int8    a frozen kernel in 4 or 8 bits                        `weights.quantize`
    Adapter      y + silu(y @ down + c) @ up + d, y = x @ base         bottleneck adapters, arXiv:1902.00751
    Tokens       an embedding or a head, of which the rows of some tokens train
    Capped       cap * tanh(x @ base / cap), a head's soft cap

The base comes first in every node and may itself be a kind: `lora(quantize(params))` is QLoRA. `trains` names the parts that
training may change; where it names the base, the base's own `trains` decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from sftjax import sharding
from sftjax.config import UserError
from sftjax.weights import grouped
from sftjax.weights.grouped import Groups
from sftjax.weights.quantize import Quantised

Weight = Any  # Array | Quantised | Kind
Axes = tuple[str | None, ...]


class Kind:
    """A weight around a base. `axes(kernel)` are the logical axes of its parts, from the kernel's."""

    base: Weight
    trains: ClassVar[tuple[str, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True)
class LowRank(Kind):
    """x @ base + scale * (dropout(x) @ a) @ b, with base [..., in, out], a [..., in, r], b [..., r, out].

    The base may be a LowRank: W - scale * a0 @ b0, the residual that PiSSA and OLoRA start from.
    """

    base: Weight
    a: Array
    b: Array
    scale: float
    dropout: float = 0.0
    trains: ClassVar = ("a", "b")

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        *lead, fan_in, fan_out = kernel  # the rank is whole everywhere
        return {"base": kernel, "a": (*lead, fan_in, None), "b": (*lead, None, fan_out)}


@partial(jax.tree_util.register_dataclass, data_fields=["base", "magnitude"], meta_fields=["divided"])
@dataclass(frozen=True)
class Dora(Kind):
    """x @ base, column by column times magnitude [..., out] / |base's column|. The norm is a constant to the gradient.

    `divided`: the magnitude is by the norms already, for a base that no longer changes.
    """

    base: LowRank
    magnitude: Array
    divided: bool = False
    trains: ClassVar = ("base", "magnitude")

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        *lead, _, fan_out = kernel
        return {"base": kernel, "magnitude": (*lead, fan_out)}

    def columns(self) -> Array:
        """What each column of the base is multiplied with, [..., out]."""
        return self.magnitude if self.divided else self.magnitude / norms(jax.lax.stop_gradient(self.base))


@partial(jax.tree_util.register_dataclass, data_fields=["base", "down", "down_bias", "up", "up_bias"], meta_fields=[])
@dataclass(frozen=True)
class Adapter(Kind):
    """y + silu(y @ down + down_bias) @ up + up_bias, with y = x @ base [..., out], down [..., out, r], up [..., r, out]."""

    base: Weight
    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    trains: ClassVar = ("base", "down", "down_bias", "up", "up_bias")

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        *lead, _, out = kernel
        rest: dict[str, Axes] = {"down": (*lead, out, None), "down_bias": (*lead, None)}
        return {"base": kernel, **rest, "up": (*lead, None, out), "up_bias": (*lead, out)}


@partial(jax.tree_util.register_dataclass, data_fields=["base", "rows"], meta_fields=["ids", "axis"])
@dataclass(frozen=True)
class Tokens(Kind):
    """An embedding [V, D] (axis 0) or a head [D, V] (axis 1), with `rows` [n, D] in place of those of the tokens `ids`."""

    base: Weight
    rows: Array
    ids: tuple[int, ...]
    axis: int
    trains: ClassVar = ("base", "rows")

    def axes(self, kernel: Axes) -> dict[str, Axes]:
        return {"base": kernel, "rows": (None, kernel[1 - self.axis])}


@partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=["cap"])
@dataclass(frozen=True)
class Capped(Kind):
    """A head whose logits stay within (-cap, cap). arXiv:2408.00118, section 2. It stands around a head, never in a tree."""

    base: Weight
    cap: float
    trains: ClassVar = ("base",)


def matmul(x: Array, w: Weight, key: Array | None = None, groups: Groups | None = None, axes: Axes | None = None) -> Array:
    """x [..., in] @ w [in, out] -> [..., out] in x's dtype. `key` turns on the dropout that the weight asks for.

    With groups, x [R, in] are rows sorted by expert and w [E, in, out] has a matrix for each. `axes` are the kernel's logical
    ones: a mesh that splits a quantised kernel gathers it by its codes.
    """
    times = partial(matmul, groups=groups)

    def of_rows(v: Array) -> Array:  # what a kind has for each output, of its row's expert
        return v if groups is None else v[groups.experts]

    match w:
        case LowRank(dropout=rate) if rate and key is not None:
            kept = jax.random.bernoulli(key, 1 - rate, x.shape)
            dropped = jnp.where(kept, x / (1 - rate), 0)
            return times(x, w.base, axes=axes) + w.scale * times(times(dropped, w.a), w.b)
        case LowRank() if groups is None and _wins_dense(x, w):
            return _low_rank_matmul(w.scale, axes, x, w.base, w.a, w.b)
        case LowRank():
            x, a, b = _together((x, w.a, w.b))
            return times(x, w.base, axes=axes) + w.scale * times(times(x, a), b)
        case Dora():
            # float32: in bfloat16 a magnitude that moved by less than 0.4 % would not have moved
            return (times(x, w.base, key, axes=axes).astype(jnp.float32) * of_rows(w.columns())).astype(x.dtype)
        case Adapter():
            y = times(x, w.base, key, axes=axes)
            inner = jax.nn.silu(times(y, w.down) + of_rows(w.down_bias).astype(x.dtype))
            return y + times(inner, w.up) + of_rows(w.up_bias).astype(x.dtype)
        case Tokens():
            return matmul(x, w.base).at[..., jnp.asarray(w.ids)].set(matmul(x, w.rows.T))
        case Capped():
            return w.cap * jnp.tanh(matmul(x, w.base) / w.cap)
        case Quantised():
            return _frozen_product(axes, x, w, groups)
        case _ if groups is not None:
            return grouped.product(x, w, groups)
        case _:
            return _product(x, w.astype(x.dtype))


def logits(x: Array, head: Weight) -> Array:
    """x [..., D] @ head [D, V] -> [..., V] float32, never rounded to x's dtype: of bfloat16 a logit near 20 has steps of 1/8."""
    if x.dtype == jnp.float32:
        return matmul(x, head)
    match head:
        case LowRank():
            return logits(x, head.base) + head.scale * logits(matmul(x, head.a), head.b)
        case Dora():
            return logits(x, head.base) * head.columns()
        case Tokens():
            return logits(x, head.base).at[..., jnp.asarray(head.ids)].set(logits(x, head.rows.T))
        case Capped():
            return head.cap * jnp.tanh(logits(x, head.base) / head.cap)
        case Adapter() | Quantised():
            return matmul(x, head).astype(jnp.float32)
        case _:
            return _product(x, head.astype(x.dtype), jnp.float32)


def _wins_dense(x: Array, w: LowRank) -> bool:
    return x.dtype == jnp.float32 and not isinstance(w.base, Kind) and x.size > 4 * math.prod(w.shape)


def dense(w: Weight, dtype: Any = None) -> Array:
    """The one matrix that `w` stands for, in `dtype` or the base's own, made in float32. Raises UserError where there is none."""
    dtype = w.dtype if dtype is None else dtype
    match w:
        case LowRank():
            return (dense(w.base, jnp.float32) + w.scale * jnp.matmul(w.a, w.b, preferred_element_type=jnp.float32)).astype(dtype)
        case Dora():
            return (dense(w.base, jnp.float32) * w.columns()[..., None, :]).astype(dtype)
        case Adapter():
            raise UserError(
                "a bottleneck adapter (method adapter) puts a nonlinearity behind its kernel and cannot be merged into it"
            )
        case Tokens():
            at = (jnp.asarray(w.ids),) if w.axis == 0 else (slice(None), jnp.asarray(w.ids))
            return dense(w.base, dtype).at[at].set((w.rows if w.axis == 0 else w.rows.T).astype(dtype))
        case Quantised():
            return w.dequantise(dtype)
        case _:
            return w.astype(dtype)


def transpose(w: Weight) -> Weight:
    """The weight of the transposed product: what a tied head makes of an embedding [V, D]."""
    flip = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    match w:
        case LowRank():
            return LowRank(transpose(w.base), flip(w.b), flip(w.a), w.scale, w.dropout)
        case Tokens():
            return Tokens(transpose(w.base), w.rows, w.ids, 1 - w.axis)
        case _:
            return flip(w)


def rows(w: Weight, ids: Array) -> Array:
    """w[ids]: rows of an embedding [V, D] -> [..., D]."""
    match w:
        case LowRank():
            return rows(w.base, ids) + w.scale * (w.a[ids] @ w.b)
        case Dora():
            return rows(w.base, ids) * w.columns()
        case Tokens():
            own = ids[..., None] == jnp.asarray(w.ids)  # [..., n]
            base = rows(w.base, ids)
            return jnp.where(own.any(-1, keepdims=True), w.rows[own.argmax(-1)].astype(base.dtype), base)
        case _:
            return w[ids]


def norms(w: LowRank) -> Array:
    """|column| of base + scale * a @ b, [..., out] float32."""
    return jnp.sqrt(jnp.square(dense(w, jnp.float32)).sum(-2))


def merges(w: Weight) -> bool:
    """May `w` become one array: is there nothing quantised in it to stay small, and no nonlinearity?"""
    return merges(w.base) if isinstance(w, Kind) and not isinstance(w, Adapter) else not isinstance(w, Kind | Quantised)


def cast(w: Any, dtype: Any) -> Any:
    """`w`, a weight or a tree of them, for products in `dtype`; what is in it already is the same array.

    What is quantised keeps its parts. A Dora whose norms have not been taken is left alone, since casting its base would change
    them. A divided one keeps its magnitude's dtype: it would round to 1.
    """

    def part(x: Any) -> Any:
        match x:
            case Dora(divided=True):
                return replace(x, base=cast(x.base, dtype))
            case Dora() | Quantised():
                return x
            case _:
                return x.astype(dtype)

    return jax.tree.map(part, w, is_leaf=lambda x: isinstance(x, Dora | Quantised))


def trained(w: Weight) -> Any:
    """A bool for every array of `w`: what training may change of a kind. Of an array, nothing."""
    nothing = jax.tree.map(lambda _: False, w)
    if not isinstance(w, Kind):
        return nothing
    return replace(nothing, **{part: trained(w.base) if part == "base" else True for part in w.trains})


def count(params: Any) -> int:
    """Parameters of a tree, a quantised kernel counting as many as it stands for."""
    leaves = jax.tree.leaves(params, is_leaf=_quantised)
    return sum(math.prod(w.shape) for w in leaves)


def _quantised(w: Any) -> bool:
    return isinstance(w, Quantised)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, dtype: Any = None) -> Array:
    """x @ w, whose gradient dw has the narrower of x and dy on the left: a CPU transposes that side in memory first. `dtype` is
    the product's, x's where None; the gradients are of x's in any case."""
    if dtype and jax.default_backend() == "cpu":  # XLA has no products of bfloat16 into float32 there
        x, w = x.astype(dtype), w.astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _product_fwd(x, w, dtype):
    return _product(x, w, dtype), (x, w)


def _product_bwd(dtype, residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    lead = tuple(range(x.ndim - 1))
    wide = x.shape[-1] > dy.shape[-1]
    dw = jnp.tensordot(dy, x, (lead, lead)).T if wide else jnp.tensordot(x, dy, (lead, lead))
    return dy @ w.T, dw


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_product(axes: Axes | None, x: Array, w: Quantised, groups: Groups | None) -> Array:
    """x @ w. Only the few bits are kept for the backward pass: it dequantises again, so no wide copy outlives its product.
    Of them each device keeps its own, and gathers the others' again."""
    return _dequantised_product(x, _whole(w, axes), groups)


def _frozen_fwd(axes, x, w, groups):
    return _frozen_product(axes, x, w, groups), (w, groups)


def _frozen_bwd(axes, residuals, dy):
    w, groups = residuals
    return _dequantised_product(dy, _whole(w, axes), groups, transposed=True), None, None


_frozen_product.defvjp(_frozen_fwd, _frozen_bwd)


def _dequantised_product(x: Array, w: Quantised, groups: Groups | None, transposed: bool = False) -> Array:
    """x @ w or x @ w.T; where a loop goes over experts, no more than one of them is wide at a time."""

    def wide(w: Quantised) -> Array:
        dense = _after(x, w).dequantise(x.dtype)
        return jnp.swapaxes(dense, -1, -2) if transposed else dense

    if groups is None:
        return x @ wide(w)
    if grouped.ragged(groups):
        return grouped.product(x, wide(w), groups)
    return grouped.by_block(x, groups, lambda expert: wide(jax.tree.map(lambda part: part[expert], w)))


def _whole(w: Weight, axes: Axes | None) -> Weight:
    """A quantised kernel that a mesh has split, whole: while it is its codes."""
    return sharding.gathered(w, axes) if axes and isinstance(w, Quantised) else w


def _after(x: Array, w: Weight) -> Weight:
    """`w`, there only once `x` is. Else a compiler that sees one expression twice, in unrolled layers or in a loop over
    micro-batches, makes every layer's wide copy first and keeps them all."""
    return jax.lax.optimization_barrier((x, w))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_rank_matmul(scale: float, axes: Axes | None, x: Array, base: Weight, a: Array, b: Array) -> Array:
    """x @ (base + scale * a @ b). With many rows in x, adding the product to the base costs in * r * out once, where
    the two thin products cost rows * r * (in + out), forward and again backward. float32 only: in bfloat16 the sum
    would round the update away. The gradients are those of the two thin products; dW is never formed for a and b.
    """
    return x @ dense(_after(x, LowRank(_whole(base, axes), a, b, scale)), jnp.float32)


def _low_rank_fwd(scale, axes, x, base, a, b):
    return _low_rank_matmul(scale, axes, x, base, a, b), (x, base, a, b)


def _low_rank_bwd(scale, axes, residuals, dy):
    x, base, a, b = residuals
    dx = dy @ dense(_after(dy, LowRank(_whole(base, axes), a, b, scale)), jnp.float32).T
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    da = scale * (x.T @ (dy @ b.T))
    db = scale * ((x @ a).T @ dy)
    # the compiler drops an array's where it is frozen; what is quantised always is
    return dx, None if isinstance(base, Quantised) else (x.T @ dy).astype(base.dtype), da, db


_low_rank_matmul.defvjp(_low_rank_fwd, _low_rank_bwd)


@jax.custom_vjp
def _together(xs: tuple[Array, ...]) -> tuple[Array, ...]:
    """`xs`, whose gradients are there only together: what da and db are made of is let go before the next kernel's turn."""
    return xs


_together.defvjp(lambda xs: (xs, None), lambda _, dxs: (jax.lax.optimization_barrier(dxs),))
