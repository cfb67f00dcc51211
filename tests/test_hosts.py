"""Several processes on this machine train as one: the same losses, resumed on another number of them; and where one is lost or
stopped all end, in words.

Every run's mesh has the same eight devices, however many processes they belong to.
"""

import json
import os
import signal
import socket

import fake_gcs
import jax
import numpy as np
import pytest
import toy as worlds

from sftjax import hosts, join, sharding, tasks
from sftjax.config import UserError
from sftjax.tasks.export import export

SETTINGS = {
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.eval_every": 3,
    "train.save_every": 1,
    "eval.generate": 2,
}
TIMES = ("tokens_per_s", "seconds/")


def begin(toy, folder, workdir, count, ends=(), settings=SETTINGS, **more):
    """`count` processes of the run, each with its part of eight devices. `ends` is {process: (name, *at)}, as toy has them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // count}",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        **more,
    }
    ends = dict(ends)
    return [
        worlds.begin(
            toy.argv(workdir(i) if callable(workdir) else workdir, settings, f"--process-id={i}"),
            folder / f"{count}.{i}.log",
            *ends.get(i, ("",)),
            env=env,
        )
        for i in range(count)
    ]


def ended(lives, folder, within=600):
    """Exit codes, and what each printed."""
    for life in lives:
        life.join(within)
    return [life.exitcode for life in lives], [(folder / f"{len(lives)}.{i}.log").read_text() for i in range(len(lives))]


def losses(workdir):
    """{(step, kind): every figure but times}."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], line.pop("kind")): {k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines}


def assert_same(got, expected, rtol=2e-6, atol=0.0):
    assert got.keys() == expected.keys()
    for key, figures in expected.items():
        for name, value in figures.items():
            wide = 10 if name == "ppl" else 1  # exp makes of a loss's difference its own
            np.testing.assert_allclose(got[key][name], value, rtol=wide * rtol, atol=atol, err_msg=f"{key} {name}")


def steps(workdir):
    return sorted(int(d.name) for d in (workdir / "checkpoints").iterdir() if d.name.isdecimal())


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """What one process with eight devices computes."""
    workdir = tmp_path_factory.mktemp("one")
    tasks.train(toy.config(**SETTINGS), workdir)
    return workdir


def test_killed_and_stopped_and_resumed_on_other_hosts_equals_one_process(toy, whole, tmp_path):
    """Two processes, of which one is killed; four, of which one is asked to stop, and all do; one finishes."""
    run = tmp_path / "run"
    codes, said = ended(begin(toy, tmp_path, run, 2, {1: ("at_step", 3, signal.SIGKILL)}), tmp_path)
    assert codes == [1, -signal.SIGKILL], said
    assert "host 0 of 2 has lost" in said[0] and "start all of them again" in said[0] and "Traceback" not in said[0]
    assert "before training" in said[0] and "before training" not in said[1]  # one tells

    codes, said = ended(begin(toy, tmp_path, run, 4, {3: ("at_step", 3, signal.SIGTERM)}), tmp_path)
    assert codes == [143] * 4, said
    stop = steps(run)[-1]
    assert 3 <= stop < 6 and all(f"stopped at step {stop} of 6 and saved" in each for each in said)
    assert "resuming after step" in said[0]

    tasks.train(toy.config(**SETTINGS), run)
    assert_same(losses(run), losses(whole))
    answers = [(each / "answers_before.json").read_text() for each in (run, whole)]  # two processes gave them, and one
    assert answers[0] == answers[1]


def test_a_directory_of_ones_own_is_told(toy, tmp_path):
    lives = begin(toy, tmp_path, lambda i: tmp_path / f"run{i}", 2, dict.fromkeys(range(2), ("impatient",)))
    codes, said = ended(lives, tmp_path)
    assert codes == [1, 1], said
    assert all("host 1 does not see there what host 0 writes" in each for each in said)
    assert not list((tmp_path / "run0").iterdir())


@pytest.fixture(scope="module")
def judge(toy, tmp_path_factory):
    """A reward model over the toy's base, as an adapter and as a checkpoint; and a function that no two hosts agree on."""
    root = tmp_path_factory.mktemp("judge")
    pairs = [{"prompt": x, "chosen": y, "rejected": "who knows?"} for x, y in worlds.COLOURS.items()]
    settings = {"task": "reward", "data.train": (str(worlds.write_rows(root / "pairs.jsonl", pairs)),), "data.max_length": 128}
    tasks.train(toy.config(**settings, **{"train.steps": 2, "train.eval_every": 0}), root / "run")
    for form in ("peft", "hf"):
        export(root / "run", to=form, out=root / form)
    (root / "own.py").write_text("import jax\ndef own(prompts): return [jax.process_index() * i for i in range(len(prompts))]\n")
    return root


ALL_TOGETHER = {  # what needs every process: the policy's answers, a reward model's scores, log-probs of every row
    "grpo": {"grpo.rewards": ("{judge}/own.py:own", "model:{judge}/hf"), "grpo.num_generations": 4, "grpo.num_iterations": 2},
    "ppo": {"ppo.rewards": ("model:{judge}/peft",), "ppo.num_ppo_epochs": 1},
    "dpo": {"dpo.precompute_ref_log_probs": True},
}
SHORT = {"mesh.data": 4, "mesh.fsdp": 2, "train.steps": 2, "train.batch_size": 8, "train.eval_every": 0, "optim.lr": 1e-3}


@pytest.mark.parametrize("task", ALL_TOGETHER)
def test_what_all_do_together_is_what_one_does(task, toy, judge, tmp_path):
    """One on its disk, two in a bucket."""
    rows = [{"prompt": f"{i}: {x}?", "chosen": y, "rejected": "?"} for i in range(6) for x, y in worlds.COLOURS.items()]
    keys = ("prompt", "chosen", "rejected") if task == "dpo" else ("prompt",)
    data = worlds.write_rows(tmp_path / "rows.jsonl", [{key: row[key] for key in keys} for row in rows])
    settings = SHORT | {"task": task, "data.train": (str(data),)} | ALL_TOGETHER[task]
    settings |= {} if task == "dpo" else {f"{task}.max_completion_length": 8}
    settings |= {k: tuple(x.format(judge=judge) for x in v) for k, v in settings.items() if k.endswith(".rewards")}
    tasks.train(toy.config(**settings), tmp_path / "one")
    settings["data.cache_dir"] = str(tmp_path / "cache")  # or the log-probs are there already
    with fake_gcs.serving("runs") as (bucket, env):
        codes, said = ended(begin(toy, tmp_path, "gs://runs/two", 2, settings=settings, **env), tmp_path)
    assert codes == [0, 0], said
    bucket.copy_to(tmp_path)
    assert_same(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)  # gains and losses cancel


# where a process stands, by its launcher's variables

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
OMPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "h:1"}
TPU = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    "env, place",
    [
        ({}, None),
        (GIVEN | {"JAX_NUM_PROCESSES": "1"}, None),
        (GIVEN | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, join.Place("h:1", 4, 3)),
        (SLURM, join.Place(method="slurm")),  # one process a host has all of its GPUs
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}, join.Place(method="slurm", devices=(5,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "5"}, join.Place(method="slurm")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # of a batch script, before any srun
        (OMPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, join.Place(method="ompi", devices=(1,))),
        (OMPI | GIVEN, join.Place("h:1", 16, 9, devices=(1,))),  # Open MPI 5
        (GIVEN | {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, join.Place("h:1", 4, 2)),  # Kubernetes
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "h"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, join.Place(method="gketpu")),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, join.Place(method="gketpu")),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"GCE_METADATA_IP": "127.0.0.1"}, join.Place(method="gcetpu")),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_launchers(env, place, monkeypatch):
    monkeypatch.setattr(join, "find_spec", lambda name: None)  # without the package kubernetes
    assert join.find(env) == place


@pytest.mark.parametrize(
    "env, flags, why",
    [
        (OMPI, (), "nothing says where the first of them is"),
        ({"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "h"}, (), "nothing says where the first of them is"),
        ({}, (None, 2, 0), "nothing says where the first of them is"),
        ({}, ("h", 2, 0), "--coordinator=h: needs HOST:PORT"),
        ({}, ("h:1", None, 0), "needs --num-processes beside it, or JAX_NUM_PROCESSES"),
        ({}, ("h:1", 2, None), "needs --process-id beside it, or JAX_PROCESS_ID"),
        ({}, ("h:1", 2, 2), "--process-id=2: 2 processes have the ids 0 to 1"),
        ({"JAX_NUM_PROCESSES": "two"}, ("h:1",), "JAX_NUM_PROCESSES=two: needs a whole number"),
    ],
)
def test_what_a_launcher_leaves_out_is_told(env, flags, why, monkeypatch):
    monkeypatch.setattr(join, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=why.replace("(", r"\(")):
        join.find(env, *flags)


def test_nothing_answers(capsys, monkeypatch):
    left = []
    monkeypatch.setattr(hosts.os, "_exit", left.append)
    join.give_up(join.Place("127.0.0.1:1", 4, 2))
    said = capsys.readouterr().err
    assert left == [1] and "process 2 of 4: after 300 s no process 0 answers at 127.0.0.1:1; see that" in said


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}], ids=str)
def test_rows_go_where_they_would_go_from_one_process(axes):
    mesh = sharding.make_mesh(**axes)
    rows = np.arange(16).reshape(8, 2)
    assert hosts.own_rows(mesh, 8) == list(range(8))
    placed = hosts.to_devices(rows, mesh)
    assert np.array_equal(placed, rows) and placed.sharding == sharding.batch_sharding(mesh)


def test_a_mesh_without_some_hosts_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"mesh.data=1 .* has 1 of the 8 devices and leaves 1 hosts without any"):
        hosts.refuse_idle(sharding.make_mesh(data=1))
