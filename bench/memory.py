"""Memory of a training step on an accelerator, as its compiler lays it out: with no weights, and no accelerator.

    python bench/memory.py                                                    # the table of results/memory.md
    python bench/memory.py --shapes llama3-8b --methods qlora --rows=2 --length=2048 --remat=full --chip=v5e:1x1
    python bench/memory.py --chip=cpu --shapes tiny --dtype=float32           # this machine's own compiler
    python bench/memory.py --quantise                                         # seconds to quantise a 4096 x 4096 kernel here

Weights are shapes only, of the kinds a run would hold; the step is the run's own, its state donated. A TPU's compiler is in
the package libtpu (`pip install libtpu`), which needs no TPU. In all = arguments (frozen weights, what trains and its
moments) + temporaries (activations, gradients, kernels dequantised) + the program.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there is a TPU, it is not asked
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor is a metadata server
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it would lock a device, were there one

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict
from sft import METHODS

from sftjax import config as schema
from sftjax import tree
from sftjax.data.batch import Batch
from sftjax.losses import masked_xent
from sftjax.models.config import DecoderConfig, Rope
from sftjax.models.decoder import Decoder, forward, init
from sftjax.train import optim
from sftjax.train.step import init_state, make_step
from sftjax.weights import method
from sftjax.weights.quantize import KINDS

GIB = 2**30
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
    p.add_argument("--remat", default="full", choices=["none", "dots", "full", "groups"])
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
    lowered = lower(shape, configure(name, a.optim), a)
    try:
        m = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        if needed := re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(e)):
            return ["-", "-", "-", f"needs {needed[1]}, has {needed[2]}"]
        raise
    parts = [m.argument_size_in_bytes, m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes]
    parts.append(m.generated_code_size_in_bytes)
    return [f"{n / GIB:.2f}" for n in (*parts, sum(parts))]


def configure(name: str, optimizer: str) -> ConfigDict:
    c = schema.default()
    c.optim.name = optimizer
    for key, value in METHODS[name].items():
        schema.override(c, key, str(value))
    return c


def lower(shape: DecoderConfig, c: ConfigDict, a: argparse.Namespace) -> jax.stages.Lowered:
    """The compiler's input for the step that a run of config `c` takes."""
    chip = None
    if a.chip != "cpu":
        device = topologies.get_topology_desc(a.chip, platform="tpu").devices[0]
        chip = jax.sharding.SingleDeviceSharding(device)
    params, mask = weights(shape, c)
    trainable, frozen = tree.split(params, mask)
    optimizer = optim.optimizer(c.optim, optim.schedule(c.optim, 100))
    state = jax.eval_shape(lambda t: init_state(t, optimizer), trainable)
    batch = Batch(*(jax.ShapeDtypeStruct((a.rows, a.length), t) for t in (jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    loss = masked_xent(forward(Decoder(shape, jnp.dtype(a.dtype), remat=a.remat)))
    micro_batches = a.rows // (a.micro_batch or a.rows)
    step = make_step(loss, optimizer, seed=0, micro_batches=micro_batches, clip=c.optim.clip)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), (state, frozen, batch))
    # the model asks what it runs on, and here the answer is what it is compiled for
    with mock.patch.object(jax, "default_backend", lambda: "cpu" if chip is None else "tpu"):
        return jax.jit(step, donate_argnums=0).lower(*placed)


def weights(shape: DecoderConfig, c: ConfigDict) -> tuple[Any, Any]:
    """(params, mask) as a run has them, of shapes: a bfloat16 checkpoint with the method applied, what trains in float32."""

    def checkpoint() -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(shape, jax.random.key(0)))

    quantisers = method.quantiser(jax.eval_shape(checkpoint), c)

    def build() -> Any:
        loaded = tree.map_leaves(lambda path, w: quantisers[path](w) if path in quantisers else w, checkpoint())
        return method.apply(loaded, c)

    params = jax.eval_shape(build)
    mask = method.mask(params, c)
    masters = jax.tree.map(lambda x, trains: jax.ShapeDtypeStruct(x.shape, jnp.float32 if trains else x.dtype), params, mask)
    return masters, mask


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
