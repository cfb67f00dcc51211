"""Many hosts: the same program in one process a host (or a device), each with its rows of a batch and its shards of a model.

What they do together once they have joined (join.py). Each does the same in the same order, so whatever is decided is decided
from what all of them know. With one process nothing here costs anything.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import sharding
from sftjax.config import UserError

SEEING = 5.0  # seconds for a file to show on another host
BROKEN = re.compile(  # what collectives and the coordination service say when a peer is gone
    r"gloo|nccl|coordination service|heartbeat|socket closed|connection (closed|reset|refused)|deadline_exceeded|unavailable",
    re.IGNORECASE,
)
T = TypeVar("T")
Q = ParamSpec("Q")


class Lost(UserError):
    """Another process is gone. Nothing that needs every process can be done any more, not even an orderly exit."""


def many() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Is this the process that logs, prints and writes?"""
    return jax.process_index() == 0


def name() -> str:
    return f"host {jax.process_index()} of {jax.process_count()}"


def gather(value: Any) -> np.ndarray:
    """[processes, ...]: the numbers of every process, of one shape, in their order; up to 32 bits."""
    return multihost_utils.process_allgather(np.asarray(value)) if many() else np.asarray(value)[None]


def fetch(arrays: Any) -> Any:
    """A tree of arrays as numpy, whole on every process wherever their parts lie."""
    if not many():
        return jax.device_get(arrays)
    here = jax.tree.map(lambda x: x if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True), arrays)
    return jax.device_get(here)


def of_first(value: np.ndarray) -> np.ndarray:
    """Process 0's numbers on every process, where all have an array of one shape and dtype."""
    if not many():
        return value
    found = gather(np.frombuffer(value.tobytes(), np.uint8))[0]
    return np.frombuffer(found.tobytes(), value.dtype).reshape(value.shape)


def which(true: Any) -> list[int]:
    """The processes where something is true."""
    return np.flatnonzero(gather(bool(true))).tolist()


@contextmanager
def agreeing() -> Iterator[None]:
    """A UserError of one process in the block ends it on all: the others would wait for that one for ever."""
    error: UserError | None = None
    try:
        yield
    except UserError as e:
        error = e
    failed = which(error is not None) if many() else []
    if error:
        raise error
    if failed:
        raise UserError(f"host {failed[0]} cannot go on, and says why")


def by_first(work: Callable[Q, T]) -> Callable[Q, T]:
    """`work`, which process 0 does while the others wait; they return None."""

    @functools.wraps(work)
    def done(*args: Q.args, **kwargs: Q.kwargs) -> T:
        with agreeing():
            return work(*args, **kwargs) if first() else None  # type: ignore[return-value]

    return done


def in_turn(work: Callable[[], T], where: Path) -> T:
    """What `work` returns, which leaves something at `where`: where all see that, process 0 does it before the others look."""
    if not many():
        return work()
    together = not blind(where)
    with agreeing():
        done = work() if first() or not together else None
    with agreeing():
        return work() if together and not first() else done  # type: ignore[return-value]


def blind(directory: Path) -> list[int]:
    """The processes that do not see in `directory` what process 0 writes there."""
    token = bytes(gather(np.frombuffer(os.urandom(8), np.uint8))[0]).hex()
    file = directory / f".hosts-{token}"  # a name never looked for: a network's file system remembers what was not there
    if first():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError:
            pass  # then nobody sees it; what comes to write there says why
    gather(0)
    until = time.monotonic() + SEEING
    while not (seen := file.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    found = which(not seen)
    if first():
        file.unlink(missing_ok=True)
    return found


def refuse_unshared(workdir: Path) -> None:
    """Raises UserError on every process where one does not see the run's directory."""
    if many() and (alone := blind(workdir)):
        raise UserError(
            f"--workdir={workdir}: host {alone[0]} does not see there what host 0 writes; it must be one directory that all "
            f"{jax.process_count()} hosts share, on NFS or Lustre, or in a bucket (gs://...)"
        )


def refuse_differences(parts: Mapping[str, str]) -> None:
    """Raises UserError that names what is not the same on all processes; `parts` are sha256 digests in hex, by name."""
    if not many():
        return
    digests = gather(np.array([list(bytes.fromhex(digest)) for digest in parts.values()], np.uint8))
    for i, part in enumerate(parts):
        if other := np.flatnonzero((digests[:, i] != digests[0, i]).any(-1)).tolist():
            raise UserError(f"host {other[0]} has another {part} than host 0; start every host with the same")


def own_shards(mesh: Mesh) -> list[int]:
    """Which of a batch's parts this process's devices hold. Processes that share a part of a tensor axis hold the same."""
    parts = sharding.batch_shards(mesh)
    places = NamedSharding(mesh, P(sharding.BATCH)).addressable_devices_indices_map((parts,))
    return sorted({index[0].indices(parts)[0] for index in places.values() if index})


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch of so many this process's devices hold; all of them where there is one process."""
    each = rows // sharding.batch_shards(mesh)
    return [row for part in own_shards(mesh) for row in range(part * each, (part + 1) * each)]


def own(batch: T, mesh: Mesh) -> T:
    """This process's rows of a batch that every process holds whole."""
    return jax.tree.map(lambda x: x[own_rows(mesh, len(x))], batch) if many() else batch


def to_devices(batch: T, mesh: Mesh) -> T:
    """The global batch [B, T] of which these arrays hold this process's rows, in the order of `own_rows`."""
    own = own_shards(mesh)

    def place(x: np.ndarray) -> jax.Array:
        each = len(x) // len(own)
        shape = (each * sharding.batch_shards(mesh), *x.shape[1:])

        def part(index: Any) -> np.ndarray:
            at = own.index(index[0].indices(shape[0])[0] // each) * each
            return x[at : at + each][:, *index[1:]]

        return jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), part)

    return jax.tree.map(place, batch)


def refuse_idle(mesh: Mesh) -> None:
    """Raises UserError where a process has no device in the mesh, as where all axes are 1."""
    used = {device.process_index for device in mesh.devices.flat}
    if len(used) < jax.process_count():
        shape = " ".join(f"--config.mesh.{axis}={n}" for axis, n in mesh.shape.items() if axis in ("data", "fsdp"))
        raise UserError(
            f"{shape}: the mesh has {mesh.size} of the {jax.device_count()} devices and leaves {jax.process_count() - len(used)} "
            "hosts without any; set one axis to -1, the rest"
        )


def votes(mesh: Mesh) -> Callable[[int], int]:
    """`vote(mine)` returns the largest number that any process gave in the previous call, 0 in the first.

    The answer is read one call late so that training never waits for it. With one process, `mine` comes straight back.
    """
    if not many():
        return lambda mine: mine
    ballots, everywhere = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    most = jax.jit(lambda x: x.max(), out_shardings=everywhere)
    cast: list[jax.Array] = []

    def vote(mine: int) -> int:
        heard = int(cast.pop()) if cast else 0
        cast.append(most(jax.make_array_from_callback((mesh.size,), ballots, lambda _: np.full(1, mine, np.int32))))
        return heard

    return vote


@contextmanager
def together(fine: type[Exception]) -> Iterator[None]:
    """While this lasts a process that ends is told by the others in a sentence, however it shows: as an error, or not at all.

    Raises Lost, or ends the process where it is stuck. `fine` is raised where all end.
    """
    if not many():
        yield
        return
    from sftjax.watch import watch

    leave = watch()
    in_order = False
    try:
        yield
        in_order = True
    except fine:
        in_order = True
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if not BROKEN.search(str(e)):
            raise
        raise Lost(f"{lost()} ({str(e).splitlines()[0][:200]})") from e
    finally:
        leave(in_order)


def lost(index: int | None = None) -> str:
    gone = "another" if index is None else f"host {index}"
    return (
        f"{name()} has lost {gone}: its process has ended, or the network to it; start all of them again with the same command, "
        "and the run goes on from its last checkpoint"
    )


def end(message: str) -> None:
    """Ends this process at once, with a sentence."""
    print(message, file=sys.stderr)
    end_at_once()


def end_at_once() -> None:
    """Ends a process that failed. In good order it would first wait for the others, who may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
