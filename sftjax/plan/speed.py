"""How long a step takes: the slowest of three, by the makers' peaks, over the share of them that a real program reaches.

    seconds = max(FLOPs / peak, bytes of products / memory's rate, bytes exchanged / link's rate) / efficiency

FLOPs and bytes are counted from the step's jaxpr (`flops.py`). arXiv:1603.06934 is the roofline's use for a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from sftjax.plan.flops import Work
from sftjax.plan.memory import Estimator
from sftjax.plan.topology import DCN, Topology

EFFICIENCY = 0.5  # an assumption; what a run reaches it prints as MFU


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's update at the peaks, and `seconds` of all at `efficiency` of the slowest."""

    compute: float
    memory: float
    network: float
    efficiency: float
    answers: float = 0.0  # before the update, where a policy learns from its own; at the same efficiency

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network) / self.efficiency + self.answers

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def step_time(work: Work, on: Estimator, topology: Topology, efficiency: float = EFFICIENCY) -> StepTime | None:
    """None where a chip's rates are not known (a CPU)."""
    chip, n = topology.chip, topology.devices
    if not chip.flops or not chip.bandwidth:
        return None
    state = on.job.updates * (2 * (on.trained + on.optimiser) + on.trained)  # read and written, the gradients read
    network = exchanged(on) / (chip.link / 2)  # a link's figure counts both directions
    if topology.slices > 1:
        network += 2 * on.job.updates * on.trained * (topology.slices - 1) / topology.slices / DCN
    answers = on.rollout.seconds(chip, n, efficiency) if on.rollout else 0.0
    return StepTime(work.flops / n / chip.flops, (work.traffic / n + state) / chip.bandwidth, network, efficiency, answers)


def exchanged(on: Estimator) -> float:
    """Bytes that one chip takes in a step.

    fsdp     every micro-batch gathers all weights twice (forward, backward) and scatters the sums of the gradients
    data     the gradients are summed once more, in a ring: 2 (n - 1) / n of them; so they are over sequence and expert
    tensor   the residual stream is summed after attention and after the MLP, forward and backward
    sequence queries, keys, values and outputs change places, forward and backward
    expert   a mixture's tokens are gathered and its sums scattered, forward and backward, of all n devices
    """
    job, sizes, c = on.job, on.sizes, on.job.decoder.config

    def others(*axes: str) -> float:
        n = math.prod(sizes[axis] for axis in axes)
        return (n - 1) / n

    width = jnp.dtype(job.decoder.dtype).itemsize
    weights = (on.frozen + on.shared + on.trained * width / 4) * sizes["fsdp"]  # masters travel in the compute dtype
    total = job.epochs * job.micro_batches * others("fsdp") * (2 * weights + on.trained * sizes["fsdp"])
    total += 2 * job.updates * others("data", "sequence", "expert") * on.trained
    values = (
        on.tokens() * job.epochs * job.micro_batches * len(job.learners) * c.layers * width
    )  # bytes of one number a token in all layers
    total += 2 * others("tensor") * 4 * values * c.width
    total += 2 * others("sequence") * values * 2 * (c.heads + c.kv_heads) * c.head_dim / sizes["tensor"]
    return total + (4 * (sizes["expert"] - 1) * values * c.width if c.experts else 0)


def sizes_text(sizes: Mapping[str, int]) -> str:
    """data=1 x fsdp=16, the axes of 1 left out."""
    return " x ".join(f"{name}={n}" for name, n in sizes.items() if n > 1) or "one device"
