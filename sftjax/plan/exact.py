"""What the TPU's own compiler says of a run's step: compiled on a machine without a TPU, for the topology that is asked for.

jax makes a compile-only client of the package libtpu (`jax.experimental.topologies`), which needs no TPU. The peak is the
compiler's own sum of its heap and what the step is given.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftjax.config import UserError
from sftjax.plan.topology import Topology

QUIET = {  # libtpu would ask a metadata server what machine this is, and lock a device
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Compiled:
    """Bytes on one chip as the compiler lays them out."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, those that take the place of donated arguments
    temporaries: int
    program: int
    seconds: float

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


class TooLarge(Exception):
    """The compiler found no room: bytes that it needs and has."""

    def __init__(self, needs: float, has: float):
        self.needs, self.has = needs, has


def ready(topology: Topology) -> None:
    """Raises UserError where there is no compiler for such a chip."""
    if not topology.chip.torus:
        raise UserError(f"--exact asks a TPU's compiler, which knows no {topology.chip.name}; leave it out")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--exact needs a TPU's compiler, which runs without a TPU: pip install libtpu (200 MB)")


def devices(topology: Topology) -> list[Any]:
    """Compile-only devices. Raises UserError where there is no TPU compiler, or no such slice."""
    ready(topology)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as a run has them
    try:
        return list(topologies.get_topology_desc(f"{topology.chip.name}:{topology.shape}", platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology={topology}: the compiler knows no such slice ({str(e).splitlines()[0]})") from e


def mesh_over(found: list[Any], sizes: dict[str, int], slices: int) -> Any:
    """A mesh over compile-only devices; of several slices `data` goes over them, the slow network between."""
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    if len(found) == 1:
        grid = np.array(found).reshape(tuple(sizes.values()))
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), found)
    else:
        if sizes["data"] % slices:
            raise UserError(f"mesh.data={sizes['data']} does not divide over {slices} slices; use --config.mesh.data={slices}")
        across = tuple(slices if name == "data" else 1 for name in sizes)
        within = tuple(n // s for n, s in zip(sizes.values(), across))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, found)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def lower(job: Any, mesh: Any) -> Any:
    """The compiler's input, as the loop has it."""
    import jax

    from sftjax.plan.step import compiling_for, placed
    from sftjax.train import loop

    with compiling_for(job.platform), jax.set_mesh(mesh):
        return loop.lower(job.step, *placed(job, mesh))


def measure(lowered: Any) -> tuple[Compiled, Any]:
    """(bytes, the compiled step). Raises TooLarge."""
    import jax

    began = time.perf_counter()
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)  # a compile-only client cannot read one
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if found := re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(e)):
            raise TooLarge(bytes_of(found[1], found[2]), bytes_of(found[3], found[4])) from e
        raise
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    m = compiled.memory_analysis()
    return (
        Compiled(
            m.argument_size_in_bytes,
            m.output_size_in_bytes,
            m.alias_size_in_bytes,
            m.temp_size_in_bytes,
            m.generated_code_size_in_bytes,
            time.perf_counter() - began,
        ),
        compiled,
    )


def bytes_of(number: str, unit: str) -> float:
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))
