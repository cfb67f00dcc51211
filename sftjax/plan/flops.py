"""FLOPs of a function, counted from its jaxpr: 2 M N K for every product, with the body of a scan as often as it runs.

What a rematerialising step computes twice is in its jaxpr twice, so it is counted twice; what is not a product (norms,
softmax, the optimiser) is left out, being a thousandth. A `while` whose number of turns nobody knows counts once, and is named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


@dataclass
class Work:
    """`flops` of all devices; `traffic`, bytes that products read and write; `guessed`, primitives counted by a guess."""

    flops: float = 0.0
    traffic: float = 0.0
    guessed: Counter[str] = field(default_factory=Counter)


def count(fn: Callable[..., Any], *args: Any) -> Work:
    """Of `fn(*args)`, where the arguments may be shapes."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    # the compiler drops what nobody reads, such as the gradient of a frozen kernel
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    work = Work()
    walk(jaxpr, 1.0, work)
    return work


def walk(jaxpr: Jaxpr, times: float, work: Work) -> None:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in PRODUCTS:
            work.flops += times * PRODUCTS[name](eqn)
            work.traffic += times * sum(size(v) for v in (*eqn.invars, *eqn.outvars))
        elif name == "scan":
            walk(params["jaxpr"].jaxpr, times * params["length"], work)
        elif name == "while":
            work.guessed["while"] += 1
            walk(params["body_jaxpr"].jaxpr, times, work)
        elif name == "cond":  # the dearest branch: a step that is not skipped
            walk_dearest([branch.jaxpr for branch in params["branches"]], times, work)
        elif name == "shard_map":  # its body is one device's
            walk(open_jaxpr(params["jaxpr"]), times * params["mesh"].size, work)
        elif name == "pallas_call":
            work.flops += times * pallas(eqn, work)
            work.traffic += times * sum(size(v) for v in (*eqn.invars, *eqn.outvars))
        else:
            for inner in inner_jaxprs(params):
                walk(inner, times, work)


def walk_dearest(branches: list[Jaxpr], times: float, work: Work) -> None:
    counted = []
    for branch in branches:
        counted.append(Work())
        walk(branch, times, counted[-1])
    dearest = max(counted, key=lambda w: w.flops)
    work.flops += dearest.flops
    work.traffic += dearest.traffic
    work.guessed += dearest.guessed


def pallas(eqn: Any, work: Work) -> float:
    """What a kernel says it costs; else half of its grid, which is what causality leaves of an attention kernel's blocks."""
    if estimate := eqn.params.get("cost_estimate"):
        return float(estimate.flops)
    work.guessed["pallas_call"] += 1
    body = Work()
    grid = [n for n in eqn.params["grid_mapping"].grid if isinstance(n, int)]
    walk(open_jaxpr(eqn.params["jaxpr"]), math.prod(grid), body)
    return body.flops / 2


def dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def ragged_dot(eqn: Any) -> float:
    """Every row meets one group's matrix: of E experts, one."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, groups = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape[-1]
    whole = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    return whole / groups if set(numbers.lhs_ragged_dimensions) & set(contracted) else whole


def convolution(eqn: Any) -> float:
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]


PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": dot,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
}


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls: of jit, remat, custom_vjp (whose backward pass is no longer among them) and the like."""
    for name, value in params.items():
        if name not in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(one, (Jaxpr, ClosedJaxpr)):
                    yield open_jaxpr(one)


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def size(var: Any) -> float:
    aval = var.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") and hasattr(aval.dtype, "itemsize") else 0.0
