"""A process finds the others of its run, by what its launcher says of them. Comes before anything is asked of jax.

srun sftjax train ...      mpirun ... sftjax train ...      a Job of Kubernetes      every worker of a TPU slice
sftjax train ... --coordinator=HOST:PORT --num-processes=4 --process-id=0      anywhere
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import jax

from sftjax import hosts
from sftjax.config import UserError

COMING = 300  # seconds for all processes to come together
SILENT = 60  # seconds without a sign of life after which a process counts as lost
LEAVING = 30  # seconds that a process waits for the others when it ends

COUNTS = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
INDICES = ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class Place:
    """This process among the others. `method` is jax's own way to find out what is None; devices () are all of the host's."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    method: str | None = "deactivate"
    devices: tuple[int, ...] = ()


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes, where there are any, as `find` has it. Raises UserError where they do not come together."""
    if jax.distributed.is_initialized():
        return
    place = find(os.environ, coordinator, count, index)
    if place is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is for train/stop.py
    late = threading.Timer(COMING, give_up, [place])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method=place.method,
            initialization_timeout=COMING + 60,  # where jax gives up, it aborts
            heartbeat_timeout_seconds=SILENT,
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError, OSError) as e:
        if "before any JAX calls" in str(e):
            why = "jax was used before the processes were joined; call jax.distributed.initialize, or sftjax.train, before that"
            raise UserError(why) from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise UserError(
            f"this process cannot join the others: {reason}; --coordinator, --num-processes and --process-id say outright "
            "where they are"
        ) from e
    finally:
        late.cancel()


def give_up(place: Place) -> None:
    """Ends this process with a sentence: jax waits without a way to be called back."""
    who = "" if place.index is None else f"process {place.index} of {place.count}: "
    found = "not all have come"
    if place.index and place.coordinator:
        there = answers(place.coordinator)
        found = f"{'' if there else 'no '}process 0 answers at {place.coordinator}{', but others have not come' if there else ''}"
    hosts.end(
        f"sftjax: {who}after {COMING} s {found}; see that all were started, with the same --coordinator and --num-processes, "
        "and that no firewall is between the hosts"
    )


def answers(address: str) -> bool:
    """Does anything listen there?"""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def find(
    env: Mapping[str, str], coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Place | None:
    """Where this process stands, by what it was given, else by the variables of its launcher; None where it is alone.

    jax knows SLURM, Open MPI 4, TPU slices and, with the package `kubernetes`, Jobs and JobSets of Kubernetes. Elsewhere
    JAX_COORDINATOR_ADDRESS says where process 0 is, and the number of processes and the index are JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or the launcher's: Open MPI's, SLURM's, and of Kubernetes JOB_COMPLETION_INDEX. Raises UserError.
    """
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    number = count if count is not None else first_of(env, COUNTS)
    place = index if index is not None else first_of(env, INDICES)
    if number == 1:
        return None
    if coordinator:
        return refuse_wrong(Place(coordinator, number, place, devices=own_devices(env)))
    if count is None and {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= {*env}:
        return Place(method="slurm", devices=own_devices(env))
    if "OMPI_MCA_orte_hnp_uri" in env and count is None:
        return Place(method="ompi", devices=own_devices(env))
    if (by := tpu_slice(env)) is not None:
        return Place(method=by)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and count is None and find_spec("kubernetes"):
        return Place(method=None)
    if count is not None or index is not None or "OMPI_COMM_WORLD_SIZE" in env or (place and "JOB_COMPLETION_INDEX" in env):
        raise UserError(
            "there are other processes, and nothing says where the first of them is; give --coordinator=HOST:PORT or "
            "JAX_COORDINATOR_ADDRESS, the same to every process"
        )
    return None


def refuse_wrong(place: Place) -> Place:
    told = f"--coordinator={place.coordinator}"
    if not re.fullmatch(r".+:\d+", place.coordinator or ""):
        raise UserError(f"{told}: needs HOST:PORT, of the host of process 0 and any port that is free there")
    for value, flag, variable in ((place.count, "num-processes", COUNTS[0]), (place.index, "process-id", INDICES[0])):
        if value is None:
            raise UserError(f"{told}: needs --{flag} beside it, or {variable}")
    if not 0 <= place.index < place.count:  # type: ignore[operator]
        raise UserError(f"--process-id={place.index}: {place.count} processes have the ids 0 to {place.count - 1}")  # type: ignore[operator]
    return place


def first_of(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """The first of these variables that is there. SLURM's count where it started this very process, not where it could."""
    for name in names:
        if name in env and not (name.startswith("SLURM") and "SLURM_STEP_NODELIST" not in env):
            if not env[name].isdecimal():
                raise UserError(f"{name}={env[name]}: needs a whole number")
            return int(env[name])
    return None


def own_devices(env: Mapping[str, str]) -> tuple[int, ...]:
    """The GPU of a process that shares its host with others, by its rank there; () = whatever it sees.

    Left to itself jax takes one GPU for a process of SLURM or Open MPI even where there is one process a host.
    """
    here = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    rank = env.get("OMPI_COMM_WORLD_LOCAL_RANK") or env.get("SLURM_LOCALID")
    seen = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    given = "JAX_LOCAL_DEVICE_IDS" in env or (len(seen) == 1 and seen[0])
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return tuple(int(i) for i in env["JAX_LOCAL_DEVICE_IDS"].split(","))
    return () if given or rank is None or here == "1" else (int(rank),)


def tpu_slice(env: Mapping[str, str]) -> str | None:
    """jax's name for the kind of TPU slice that this is a host of; None where it is none, or has no other host."""
    if "TPU_ML_PLATFORM" not in env:  # set by jax where libtpu and chips are
        return None
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return "gketpu" if "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
    if "TPU_SKIP_MDS_QUERY" in env:
        return None
    try:
        socket.getaddrinfo(env.get("GCE_METADATA_IP", "metadata.google.internal"), 80)
    except OSError:
        return None
    return "gcetpu"
