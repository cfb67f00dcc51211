"""Memory of a training step on an accelerator, as its compiler lays it out: with no weights, and no accelerator.

    python bench/memory.py                                                    # the table of results/memory.md
    python bench/memory.py --shapes llama3-8b --methods qlora --rows=2 --length=2048 --remat=block --chip=v5e:1x1
    python bench/memory.py --chip=cpu --shapes tiny --dtype=float32           # this machine's own compiler
    python bench/memory.py --quantise                                         # seconds to quantise a 4096 x 4096 kernel here

Weights are shapes only, of the kinds a run would hold; the step is the run's own, its state donated. A TPU's compiler is in
the package libtpu (`pip install libtpu`), which needs no TPU. In all = arguments (frozen weights, what trains and its
moments) + temporaries (activations, gradients, kernels dequantised) + the program.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there is a TPU, it is not asked

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from sft import METHODS

from sftjax import config as schema
from sftjax.check import CHOICES
from sftjax.chips import GIB
from sftjax.models.config import DecoderConfig, Rope
from sftjax.plan import exact
from sftjax.plan.step import Dry, mesh_sizes
from sftjax.plan.topology import parse
from sftjax.weights.quantize import KINDS

SHAPES = {
    "llama3-8b": DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, max_positions=8192, rope=Rope(theta=500_000)),
    "llama2-7b": DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, max_positions=4096),
    "tiny": DecoderConfig(2048, 256, 1024, 4, 4, 2, 64),
}
ANCHORS = {  # GiB that others publish
    ("llama3-8b", "qlora"): "7.4 torchtune",
    ("llama3-8b", "lora"): "16.2 torchtune",
    ("llama2-7b", "qlora"): "5.6 LLaMA-Factory",
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["llama3-8b"], choices=SHAPES)
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--micro-batch", type=int, help="rows at a time (default all)")
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--remat", default="block", choices=CHOICES["model.remat"])
    p.add_argument("--optim", default="adamw", help="the optimiser (default adamw, with two moments; lion has one)")
    p.add_argument("--dtype", default="bfloat16", help="compute dtype (default bfloat16)")
    p.add_argument("--chip", default="v6e:1x1", help="a TPU topology such as v5e:1x1, or cpu (default v6e:1x1)")
    p.add_argument("--quantise", action="store_true", help="time the quantisers on this machine, and nothing else")
    a = p.parse_args()
    if a.quantise:
        return quantise()
    print("|shape|method|rows x length|remat|arguments|temporaries|program|in all, GiB|others|compile s|")
    print("|---|---|---|---|---:|---:|---:|---:|---|---:|")
    for shape in a.shapes:
        for name in a.methods:
            began = time.perf_counter()
            cells = sizes(SHAPES[shape], name, a)
            rows = f"{a.rows} x {a.length}" + (f", {a.micro_batch} at a time" if a.micro_batch else "")
            took = f"{time.perf_counter() - began:.0f}"
            print("|" + "|".join([shape, name, rows, a.remat, *cells, ANCHORS.get((shape, name), ""), took]) + "|", flush=True)


def sizes(shape: DecoderConfig, name: str, a: argparse.Namespace) -> list[str]:
    """Arguments, temporaries, program and their sum in GiB; where the chip has too little, what the compiler says it needs."""
    where = parse(a.chip)
    c = configure(name, a)
    job = Dry(c, shape, jnp.bfloat16, a.length, "tpu" if where.chip.torus else "cpu")
    devices = exact.devices(where) if where.chip.torus else jax.devices()[:1]
    mesh = exact.mesh_over(devices, mesh_sizes(c, where.devices), where.slices)
    try:
        m, _ = exact.measure(exact.lower(job, mesh))
    except exact.TooLarge as e:
        return ["-", "-", "-", f"needs {e.needs / GIB:.2f}, has {e.has / GIB:.2f}"]
    parts = [m.arguments, m.temporaries + m.outputs - m.aliased, m.program]
    return [f"{n / GIB:.2f}" for n in (*parts, m.peak)]


def configure(name: str, a: argparse.Namespace) -> ConfigDict:
    c = schema.default()
    keys = {"optim.name": a.optim, "model.remat": a.remat, "model.dtype": a.dtype, "train.batch_size": a.rows}
    for key, value in (keys | {"train.micro_batch": a.micro_batch} | METHODS[name]).items():
        schema.override(c, key, str(value))
    return c


def quantise(runs: int = 10) -> None:
    """The fastest of `runs`, compiled before."""
    kernel = jax.random.normal(jax.random.key(0), (4096, 4096))
    for name, kind in KINDS.items():
        bits = 8 * sum(x.nbytes for x in jax.tree.leaves(kind(kernel))) / kernel.size
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            jax.block_until_ready(kind(kernel))
            seconds.append(time.perf_counter() - began)
        print(f"{name}: 4096 x 4096 float32 in {min(seconds):.3f} s, {bits:.2f} bits a weight")


if __name__ == "__main__":
    main()
