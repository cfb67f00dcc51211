"""MXFP4, as the hub's GPT-OSS holds its experts: 4 bits a weight and a power of two for every 32 of them, read as bfloat16.

    name_blocks uint8 [E, out, in / 32, 16], name_scales uint8 [E, out, in / 32]  ->  name bfloat16 [E, in, out]

A byte holds two neighbours along `in`, the first in its low half: a sign and three bits of E2M1. A scale is an exponent of two,
plus 127. OCP Microscaling Formats 1.0, section 5; every value but the very smallest and largest is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from sftjax.hf.tensors import MXFP4, Stored

BLOCK = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], -1)  # of each byte
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))  # of each scale; 255 is no number


@dataclass(frozen=True)
class Packed:
    """One tensor of two that are stored, to be read as a Stored is."""

    blocks: Stored
    scales: Stored
    dtype: ClassVar = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, blocks = self.scales.shape
        return experts, blocks * BLOCK, out

    def view(self) -> np.ndarray:
        return self.take((slice(None),) * 3)

    def take(self, index: tuple[slice, ...]) -> np.ndarray:
        """As `Stored.take`, with no more than one expert in float32 at a time."""
        experts, rows, columns = index
        start, stop, _ = rows.indices(self.shape[1])
        whole = slice(start // BLOCK, -(-stop // BLOCK))
        codes, scales = (part.view()[experts, columns, whole] for part in (self.blocks, self.scales))
        first = start - whole.start * BLOCK
        out = np.empty((*codes.shape[:2], stop - start), self.dtype)
        for one, code, scale in zip(out, codes, scales):
            wide = PAIRS[code].reshape(*scale.shape, BLOCK) * POWERS[scale][..., None]
            one[:] = wide.reshape(len(scale), -1)[:, first : first + stop - start]
        return out.swapaxes(1, 2)


def unpacked(tensors: Mapping[str, Stored]) -> dict[str, Stored | Packed]:
    """With one tensor in place of each pair."""
    blocks, scales = MXFP4
    out: dict[str, Stored | Packed] = dict(tensors)
    for name in [name.removesuffix(scales) for name in tensors if name.endswith(scales)]:
        codes, powers = tensors.get(name + blocks), tensors[name + scales]
        if codes and len(powers.shape) == 3 and codes.shape == (*powers.shape, BLOCK // 2):
            del out[name + blocks], out[name + scales]
            out[name] = Packed(codes, powers)
    return out
