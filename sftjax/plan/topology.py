"""The slices of chips that a plan is made for, by the names by which people rent them.

v5e:4x4, v5e-16, v5litepod-16    one slice of 16 chips        2xv5e-16    two of them
v5p-32, v4-32                    of 16 chips, named by their 32 cores
h100x8, 8xh100, a100-80gb x 8, t4, cpu
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass

from sftjax.chips import CHIPS, Chip
from sftjax.config import UserError

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
ALIASES |= {"a100": "a100-80gb", "a100-80": "a100-80gb", "a100-40": "a100-40gb"}
DCN = 6.25e9  # bytes/s a chip between slices: 50 Gbit/s, https://docs.cloud.google.com/tpu/docs/v5p
# the usual slices, of 2 and of 3 dimensions: "configurations" of the pages above
SHAPES = {
    dimensions: {math.prod(map(int, shape.split("x"))): shape for shape in shapes.split()}
    for dimensions, shapes in (
        (2, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
        (3, "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"),
    )
}


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `chips` chips; of a TPU also their shape, such as 4x4."""

    chip: Chip
    chips: int = 1
    slices: int = 1
    shape: str = ""

    @property
    def devices(self) -> int:
        return self.chips * self.slices

    def __str__(self) -> str:
        many = f"{self.slices} slices of " if self.slices > 1 else ""
        if self.shape:
            return f"{many}{self.chip.name}:{self.shape}"
        return self.chip.name if self.devices == 1 else f"{self.chips} x {self.chip.name}"


def parse(text: str) -> Topology:
    """The topology of a name. Raises UserError that says what there is."""
    name = text.strip().lower().replace(" ", "")
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Topology(Chip("cpu", "cpu", memory, None, None, 0.0))
    found = re.fullmatch(r"(?:(\d+)x)?(.+?)(?::(.*)|[x-](\d+))?", name)
    slices, kind, shape, count = (1, name, None, None) if chip_named(name) or not found else found.groups()
    slices, count = int(slices or 1), int(count) if count else None
    chip = chip_named(kind)
    if chip is None:
        near = difflib.get_close_matches(kind, [*CHIPS, *ALIASES, "cpu"], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join([*CHIPS, 'cpu'])}"
        raise UserError(f"--topology={text}: no such chip{hint}")
    if count == 0 or slices == 0:
        raise UserError(f"--topology={text}: needs at least one chip")
    if not chip.torus:
        if shape is not None:
            raise UserError(f"--topology={text}: {chip.name} has no shape {shape}; say {chip.name}x8")
        return Topology(chip, (count or 1) * slices)
    if shape is not None:
        sides = [int(side) for side in shape.split("x") if side.isdigit()]
        if "x".join(map(str, sides)) != shape or len(sides) != chip.torus or not all(sides):
            raise UserError(f"--topology={text}: a slice of {chip.name} has {chip.torus} sides, such as {SHAPES[chip.torus][4]}")
        return Topology(chip, math.prod(sides), slices, shape)
    chips = 1 if count is None else count / chip.cores
    if chips not in SHAPES[chip.torus]:
        names = ", ".join(f"{chip.name}-{n * chip.cores}" for n in SHAPES[chip.torus])
        raise UserError(f"--topology={text}: no such slice; there are {names}")
    return Topology(chip, int(chips), slices, SHAPES[chip.torus][int(chips)])


def chip_named(name: str) -> Chip | None:
    return CHIPS.get(ALIASES.get(name, name))
