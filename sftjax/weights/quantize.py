"""Frozen kernels in fewer bits: NF4 with double quantisation, 4.13 bits a weight, and int8.

NF4 is QLoRA's, arXiv:2305.14314: a block is 64 weights along `in` that feed one output; each weight is the nearest of
16 quantiles of a normal distribution (eq. 4) times the block's largest magnitude, itself in 8 bits (eq. 6).

    w [..., in, out]  ->  codes   uint8   [..., in / 2, out]         two weights a byte, the even row in the high half
                          absmax  uint8   [..., in / 64, out]        of each block, less `offset`, in units of `scale`
                          scale   float32 [..., in / 64, out / 256]  of 256 neighbouring outputs' blocks
                          offset  float32 [..., 1, 1]                the mean absmax

    w[i, o] = NF4[code] * absmax    and    absmax = DYNAMIC[code] * scale + offset

`in` is padded with zeros to whole blocks. Codes equal those of bitsandbytes for the torch weight [out, in], byte for
byte; absmax is grouped along `out`, where bitsandbytes takes 256 blocks in the order of memory, so that a shard of
either dimension stays whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import tree
from sftjax.config import UserError
from sftjax.weights.targets import match, module_name

BLOCK, GROUP = 64, 256  # weights to an absmax, absmax to a scale
TINY = np.finfo(np.float32).tiny  # stands in for the largest magnitude of what is all zero

# the 16 values of bitsandbytes: quantiles of a normal distribution, scaled to [-1, 1], with a zero that is exact
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic() -> np.ndarray:
    """The signed dynamic map, arXiv:1511.04561: decade d of seven, from 1e-6 up, has 2**d steps, each by its middle.

    So a value a hundred times smaller than its group's largest still has some five bits.
    """
    n = np.arange(1, 128)
    decade = np.floor(np.log2(n))
    positive = 10 ** (decade - 6) * (0.1 + 0.9 * ((n + 0.5) / 2**decade - 1))
    return np.concatenate([-positive[::-1], [0], positive, [1]]).astype(np.float32)


DYNAMIC = _dynamic()


class Quantised(ABC):
    """A frozen kernel in fewer bits. A new quantisation is a dataclass with these three, and an entry of `KINDS`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(..., in, out) of the kernel it stands for."""

    @abstractmethod
    def axes(self, kernel: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the parts, from the kernel's."""

    @abstractmethod
    def dequantise(self, dtype: Any = None) -> Array:
        """The kernel [..., in, out] in `dtype`, or in the dtype it had."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax", "scale", "offset"], meta_fields=["fan_in", "dtype"])
@dataclass(frozen=True)
class Nf4(Quantised):
    """Four bits a weight; the module's docstring draws the parts. `dtype` is that of the kernel before."""

    codes: Array
    absmax: Array
    scale: Array
    offset: Array
    fan_in: int
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.fan_in, self.codes.shape[-1])

    def axes(self, kernel: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        whole = (*kernel[:-2], None, None)
        return {"codes": kernel, "absmax": kernel, "scale": whole, "offset": whole}

    @partial(jax.jit, static_argnames="dtype")
    def dequantise(self, dtype: Any = None) -> Array:
        *lead, _, fan_out = self.codes.shape
        scale = jnp.repeat(self.scale, GROUP, axis=-1)[..., :fan_out]
        absmax = jnp.asarray(DYNAMIC)[self.absmax] * scale + self.offset  # [..., in / 64, out]
        codes = self.codes[..., None, :] >> np.array([[4], [0]], np.uint8) & 15  # [..., in / 2, 2, out]
        blocks = _nf4_values(codes.reshape(*lead, -1, BLOCK, fan_out)) * absmax[..., None, :]
        return blocks.astype(dtype or self.dtype).reshape(*lead, -1, fan_out)[..., : self.fan_in, :]


@jax.jit
def nf4(w: Array) -> Nf4:
    """w [..., in, out] in NF4 with double quantisation. A weight midway between two values takes the lower."""
    *lead, fan_in, fan_out = w.shape
    blocks = _padded(w.astype(jnp.float32), -2, BLOCK).reshape(*lead, -1, BLOCK, fan_out)
    absmax = jnp.abs(blocks).max(-2)  # [..., in / 64, out]
    codes = _nearest(NF4, blocks * (1 / jnp.maximum(absmax, TINY))[..., None, :]).reshape(*lead, -1, 2, fan_out)

    # rounded: on a mesh the mean is summed in another order, and its last bits would move absmax codes that lie on an edge
    offset = absmax.mean((-2, -1), keepdims=True).astype(jnp.bfloat16).astype(jnp.float32)
    groups = _padded(absmax - offset, -1, GROUP).reshape(*lead, absmax.shape[-2], -1, GROUP)
    scale = jnp.abs(groups).max(-1)
    shrunk = _nearest(DYNAMIC, groups / jnp.maximum(scale, TINY)[..., None])
    shrunk = shrunk.reshape(*absmax.shape[:-1], -1)[..., :fan_out]
    return Nf4(codes[..., 0, :] << 4 | codes[..., 1, :], shrunk, scale, offset, fan_in, w.dtype.name)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Int8(Quantised):
    """codes int8 [..., in, out] * scale float32 [..., 1, out]. `dtype` is that of the kernel before."""

    codes: Array
    scale: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def axes(self, kernel: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        return {"codes": kernel, "scale": (*kernel[:-2], None, kernel[-1])}

    @partial(jax.jit, static_argnames="dtype")
    def dequantise(self, dtype: Any = None) -> Array:
        return (self.codes * self.scale).astype(dtype or self.dtype)


@jax.jit
def int8(w: Array) -> Int8:
    """w [..., in, out] rounded to 127 steps each way of its output's largest magnitude."""
    wide = w.astype(jnp.float32)
    scale = jnp.abs(wide).max(-2, keepdims=True) / 127
    return Int8(jnp.round(wide / jnp.maximum(scale, TINY)).astype(jnp.int8), scale, w.dtype.name)


KINDS: dict[str, Callable[[Array], Quantised]] = {"nf4": nf4, "int8": int8}


def quantize(params: Any, kind: str = "nf4") -> Any:
    """Every linear kernel of the layers in fewer bits; embedding, head, norms and biases stay as they are.

        {"q": [L, D, D]}  ->  {"q": Nf4(...)}

    Raises UserError for an unknown kind, and where a kernel is no array any more: `lora(quantize(params))`, in that order.
    """
    chosen = quantisers(params, kind)

    def leaf(path: str, w: Any) -> Any:
        if path in chosen and not isinstance(w, Array):
            raise UserError(f"quantize: {module_name(path)} is a {type(w).__name__} already; quantise before anything else")
        return chosen[path](w) if path in chosen else w

    return tree.map_leaves(leaf, params)


def quantisers(params: Any, kind: str, but: Collection[str] = ()) -> dict[str, Callable[[Array], Quantised]]:
    """{path: how it is quantised} of every linear kernel of the layers not `but`. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"quantize: {kind!r} is not known; there are {', '.join(KINDS)}")
    return dict.fromkeys(sorted(match(params, "all-linear").difference(but)), KINDS[kind])


def _nearest(table: np.ndarray, x: Array) -> Array:
    """Indices into a sorted table, the lower at a tie. A sum of comparisons: unlike a search, it runs in wide vectors; as a loop,
    as 255 of them take longer to compile than to run."""
    middles = jnp.asarray((table[1:] + table[:-1]) / 2)

    def count(i: Array, found: Array) -> Array:
        return found + (x > middles[i]).astype(jnp.uint8)

    return jax.lax.fori_loop(0, len(middles), count, jnp.zeros(x.shape, jnp.uint8), unroll=15)


def _nf4_values(codes: Array) -> Array:
    """NF4[codes] as selects by one bit after the other: a gather of this many is slow on a TPU."""
    # tied to the codes: of bare constants a loop over layers keeps sixteen arrays of the kernel's shape, float32, made once
    table, codes = jax.lax.optimization_barrier((jnp.asarray(NF4), codes))
    values = list(table)
    for bit in range(4):
        odd = codes & (1 << bit) != 0
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def _padded(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros at the end of `axis`, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
