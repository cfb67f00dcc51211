"""The chips there are, by the names by which people rent them: one table for what a plan expects and what a run measures."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One jax device. Rates are the maker's peaks, for dense bfloat16 (float16 where a chip has no bfloat16)."""

    name: str
    kind: str  # a pattern of what jax calls it
    memory: float  # bytes that a program may use
    flops: float | None  # FLOP/s
    bandwidth: float | None  # bytes/s of its memory
    link: float  # bytes/s to its neighbours, both directions together
    cores: int = 1  # that a slice's name counts a chip
    torus: int = 0  # dimensions; 0 is no TPU


GB, MIB, GIB, TERA = 1e9, 2**20, 2**30, 1e12
CHIPS = {
    chip.name: chip
    for chip in (
        # https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: "key specifications"; a link is their "bidirectional
        # inter-chip interconnect bandwidth per chip", v4's six links of 50 GB/s each way: arXiv:2304.01433, section 2.
        # Memory is what the compiler (libtpu 0.0.51) says there is, a quarter to one and a quarter GiB below the page's.
        Chip("v4", r"TPU v4$", 30.75 * GIB, 275 * TERA, 1200 * GB, 600 * GB, cores=2, torus=3),
        Chip("v5e", r"TPU v5 ?lite|TPU v5e", 15.75 * GIB, 197 * TERA, 819 * GB, 400 * GB, torus=2),
        Chip("v5p", r"TPU v5p?$", 95.73 * GIB, 459 * TERA, 2765 * GB, 1200 * GB, cores=2, torus=3),
        Chip("v6e", r"TPU v6 ?lite|TPU v6e", 31.24 * GIB, 918 * TERA, 1638 * GB, 800 * GB, torus=2),
        # NVIDIA's data sheets, dense, SXM where there are several: https://www.nvidia.com/en-us/data-center/h200/, /h100/,
        # /a100/, /l4/, /tesla-t4/; a link is NVLink, else PCIe. Memory is what nvidia-smi shows, of which CUDA takes some 0.5.
        Chip("h200", r"\bG?H200\b", 143771 * MIB, 989 * TERA, 4800 * GB, 900 * GB),
        Chip("h100-pcie", r"\bH100 PCIe\b", 81559 * MIB, 756 * TERA, 2000 * GB, 600 * GB),
        Chip("h100-nvl", r"\bH100 NVL\b", 95830 * MIB, 835 * TERA, 3938 * GB, 600 * GB),
        Chip("h100", r"\bH100\b", 81559 * MIB, 989 * TERA, 3350 * GB, 900 * GB),
        Chip("a100-80gb", r"\bA100\b.*80GB", 81920 * MIB, 312 * TERA, 2039 * GB, 600 * GB),
        Chip("a100-40gb", r"\bA100\b", 40960 * MIB, 312 * TERA, 1555 * GB, 600 * GB),
        Chip("l4", r"\bL4\b", 23034 * MIB, 121 * TERA, 300 * GB, 64 * GB),
        Chip("t4", r"\bT4\b", 15360 * MIB, 65 * TERA, 300 * GB, 32 * GB),
    )
}


def of_kind(kind: str) -> Chip | None:
    """The chip that jax calls by this `device_kind`; None where it is not known (a CPU, a slice of a GPU)."""
    return None if "MIG" in kind else next((chip for chip in CHIPS.values() if re.search(chip.kind, kind)), None)
