"""Resumed equals uninterrupted, bit for bit, whatever ended the run: parameters, optimiser, metrics, checkpoints, summary."""

import json
import shutil
import signal
import subprocess

import fake_gcs
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy as worlds

from sftjax import tasks
from sftjax.config import UserError

# dropout, noise and accumulation, so that a key or an order that is not a function of the step would show
SETTINGS = {
    "lora.dropout": 0.1,
    "loss.neftune_alpha": 5.0,
    "train.micro_batch": 2,
    "train.eval_every": 4,
    "train.save_every": 2,
    "optim.lr": 0.05,  # so much that the best checkpoint may be none of the last
    "optim.schedule": "constant",
}
TIMES = ("tokens_per_s", "steady_tokens_per_s", "compile_s", "first_step_s", "total_s", "peak_memory_mib", "seconds", "resumes")


@pytest.fixture(scope="module")
def train(toy):
    """Runs the same command again, in this process."""
    return lambda workdir, **changes: tasks.train(toy.config(**SETTINGS | changes), workdir)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """What a run that nothing interrupted leaves."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir)
    return left_by(workdir)


@pytest.fixture(scope="module")
def half(toy, tmp_path_factory):
    """`half(to)` copies a run that was stopped at step 6 of 12, with checkpoints of steps 4 and 6."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    code, said = worlds.live(toy.argv(workdir, SETTINGS), workdir.parent / "log", "at_step", 6, signal.SIGTERM)
    assert code == 143, said
    assert steps(workdir) == [4, 6]
    return lambda to: shutil.copytree(workdir, to / "run")


def left_by(workdir):
    """Everything that a run computed, and nothing of how long it took."""
    newest = workdir / "checkpoints" / str(steps(workdir)[-1])
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(newest / "state")
    return {
        "state": {name: np.asarray(x).tobytes() for name, x in state.items()},
        "extras": untimed(json.loads((newest / "extras" / "metadata").read_text())),
        "metrics": [untimed(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        "summary": untimed(json.loads((workdir / "summary.json").read_text())),
        "steps": steps(workdir),
    }


def untimed(values):
    return {key: value for key, value in values.items() if key not in TIMES}


def steps(workdir):
    return sorted(int(d.name) for d in (workdir / "checkpoints").iterdir() if d.name.isdecimal())


def differences(a, b):
    return [key for key in a if a[key] != b[key]]


DEATHS = {
    "killed in the first step": ("at_step", 1, signal.SIGKILL),
    "killed between two saves": ("at_step", 5, signal.SIGKILL),
    "killed in the last step": ("at_step", 12, signal.SIGKILL),
    "killed while the first checkpoint was written": ("while_saving", 1),
    "killed while the third checkpoint was written": ("while_saving", 3),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
def test_resumed_after_kill_equals_whole(toy, train, whole, tmp_path, death):
    code, said = worlds.live(toy.argv(tmp_path / "run", SETTINGS), tmp_path / "log", *death)
    assert code == -signal.SIGKILL, said
    train(tmp_path / "run")
    assert not differences(whole, left_by(tmp_path / "run"))


def test_in_a_bucket_likewise(toy, whole, tmp_path):
    """Killed and resumed there, and exported from there."""
    run = toy.argv("gs://runs/mine", SETTINGS)
    with fake_gcs.serving("runs") as (bucket, env):
        code, said = worlds.live(run, tmp_path / "log", "at_step", 5, signal.SIGKILL, env=env)
        assert code == -signal.SIGKILL, said
        code, said = worlds.live(run, tmp_path / "log", env=env)
        assert code == 0 and "resuming after step" in said, said
        out = tmp_path / "peft"
        argv = ["export", "--workdir=gs://runs/mine", "--to=peft", f"--out={out}"]
        code, said = worlds.live(argv, tmp_path / "log", env=env)
    assert code == 0 and (out / "adapter_model.safetensors").is_file(), said
    bucket.copy_to(tmp_path)
    assert not differences(whole, left_by(tmp_path / "mine"))
    assert (tmp_path / "mine" / "report.html").is_file()


def test_killed_at_random_moments_equals_whole(toy, train, whole, tmp_path):
    seed = np.random.SeedSequence().entropy % 2**32
    for life in range(3):
        code, said = worlds.live(toy.argv(tmp_path / "run", SETTINGS), tmp_path / "log", "sometime", 0.6, seed + life)
        assert code in (0, -signal.SIGKILL), said
    train(tmp_path / "run")
    assert not differences(whole, left_by(tmp_path / "run")), f"seed {seed}"


@pytest.mark.parametrize("signum, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_says_how_to_go_on(toy, train, whole, tmp_path, signum, expected):
    code, said = worlds.live(toy.argv(tmp_path / "run", SETTINGS), tmp_path / "log", "at_step", 5, signum)
    assert code == expected, said
    assert said.splitlines()[-1] == "stopped at step 5 of 12 and saved; run the same command again to go on"
    assert steps(tmp_path / "run")[-1] == 5
    train(tmp_path / "run")
    assert not differences(whole, left_by(tmp_path / "run"))


def test_a_signal_in_the_last_step_finds_nothing_to_stop(toy, whole, tmp_path):
    code, said = worlds.live(toy.argv(tmp_path / "run", SETTINGS), tmp_path / "log", "at_step", 12, signal.SIGTERM)
    assert code == 0, said
    assert not differences(whole, left_by(tmp_path / "run"))


def test_a_second_ctrl_c_stops_at_once(toy, tmp_path):
    code, said = worlds.live(toy.argv(tmp_path / "run", SETTINGS), tmp_path / "log", "twice_at_step", 5, signal.SIGINT)
    assert code == 130, said
    assert "Traceback" not in said
    assert steps(tmp_path / "run") == [2, 4]


def cut_short(checkpoint):
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state" / "d")


def without_extras(checkpoint):
    shutil.rmtree(checkpoint / "extras")


@pytest.mark.parametrize("damage", [cut_short, without_arrays, without_extras])
def test_a_damaged_checkpoint_is_told_and_passed_over(train, whole, half, tmp_path, capfd, damage):
    workdir = half(tmp_path)
    damage(workdir / "checkpoints" / "6")
    train(workdir)
    said = capfd.readouterr().out
    assert "checkpoint 6 cannot be read" in said
    assert "resuming after step" in said
    assert not differences(whole, left_by(workdir))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB that can grow; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(toy, train, whole, tmp_path, small_disk):
    argv = toy.argv(small_disk / "run", SETTINGS | {"train.keep": 20})
    code, said = worlds.live(argv, tmp_path / "log")
    kept = steps(small_disk / "run")
    assert code == 1, said
    assert said.splitlines()[-1].endswith(
        f"the disk is full; the checkpoint of step {kept[-1]} is whole: free some space and run the same command again"
    )
    assert "Traceback" not in said
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    train(small_disk / "run", **{"train.keep": 20})
    assert differences(whole, left_by(small_disk / "run")) == ["steps"]


def test_a_leftover_temporary_checkpoint_is_no_checkpoint(train, whole, half, tmp_path, capfd):
    workdir = half(tmp_path)
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "6", checkpoints / "8.orbax-checkpoint-tmp-0")
    cut_short(checkpoints / "8.orbax-checkpoint-tmp-0")
    train(workdir)
    assert "resuming after step 6 of 12" in capfd.readouterr().out
    assert not differences(whole, left_by(workdir))
    assert not list(checkpoints.glob("*tmp*"))


def test_where_no_checkpoint_can_be_read_nothing_is_thrown_away(train, half, tmp_path):
    workdir = half(tmp_path)
    for step in (4, 6):
        cut_short(workdir / "checkpoints" / str(step))
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        train(workdir)
    assert steps(workdir) == [4, 6]


def test_a_finished_run_has_nothing_left_to_do(train, whole, half, tmp_path):
    workdir = half(tmp_path)
    train(workdir)
    train(workdir)
    assert not differences(whole, left_by(workdir))
