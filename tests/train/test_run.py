"""Run: metrics survive kill -9 at any byte, files are whole or absent, JSON is always valid."""

import errno
import gc
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from sftjax.config import UserError
from sftjax.train import run as run_module
from sftjax.train import tensorboard
from sftjax.train.run import Run, read_metrics


def strict(text):
    """JSON as the standard has it: Python's NaN and Infinity are refused."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def values(step: int) -> dict:
    return {"loss": 3 / step, "lr": 1e-4 * step, "tokens": 512 * step}


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log(step, values(step))
        if step % 4 == 0:
            run.log(step, {"loss": 2 / step}, kind="eval")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    workdir = tmp_path_factory.mktemp("whole")
    with Run(workdir, writer=True) as run:
        train(run, 1, 12)
    return (workdir / "metrics.jsonl").read_bytes()


def test_resumed_equals_uninterrupted_wherever_it_was_cut(tmp_path, whole):
    path = tmp_path / "metrics.jsonl"
    for cut in [*range(0, len(whole), 11), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:cut])
        # a checkpoint is saved after all of its step's metrics, of which the evaluation's is the last
        checkpoint = max((line["step"] for line in read_metrics(path) if line["kind"] == "eval"), default=0)
        with Run(tmp_path, writer=True) as run:
            run.resume_from(checkpoint)
            train(run, checkpoint + 1, 12)
        assert path.read_bytes() == whole, cut


def test_resumed_equals_uninterrupted_after_kill_9(tmp_path, whole):
    script = (
        "import os, sys\n"
        "from sftjax.train.run import Run\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_run import train\n"
        "run = Run(sys.argv[1], writer=True)\n"
        "train(run, 1, 10)\n"
        'os.write(run.metrics.fd, b\'{"step": 11, "ki\')\n'
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Run(tmp_path, writer=True) as run:
        run.resume_from(8)
        train(run, 9, 12)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_starting_over_forgets_everything(tmp_path, whole):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "kind": "eval", "loss": 9}\n' + whole)
    with Run(tmp_path, writer=True) as run:
        run.resume_from(-1)
        assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_killed_while_truncating_leaves_the_old_or_the_new(tmp_path, whole, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(whole)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with Run(tmp_path, writer=True) as run, pytest.raises(KeyboardInterrupt):
        run.resume_from(4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\nhello\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        Run(tmp_path, writer=True).resume_from(1)


def test_what_is_not_finite_is_null_and_counted(tmp_path):
    import jax.numpy as jnp

    with Run(tmp_path, writer=True) as run:
        run.log(1, {"loss": math.nan, "grad_norm": jnp.float32("inf"), "lr": np.float64(0.5), "tokens": jnp.int32(7)})
        run.log(2, {"loss": 1.0})
        run.write_json("summary.json", {"a": [1.0, -math.inf], "b": {"c": np.float32("nan"), "d": np.arange(2)}})
        run.write_lines("samples.jsonl", [{"score": math.nan, "text": "é\n\ud800"}])
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    nulls = {"loss": None, "grad_norm": None, "lr": 0.5, "tokens": 7, "nonfinite": 2}
    assert strict(first) == {"step": 1, "kind": "train", **nulls}
    assert "nonfinite" not in strict(second)
    summary = strict((tmp_path / "summary.json").read_text())
    assert summary == {"a": [1.0, None], "b": {"c": None, "d": [0, 1]}, "nonfinite": 2}
    assert strict((tmp_path / "samples.jsonl").read_text())["score"] is None


def test_config_written_and_read_back(tmp_path):
    config = ml_collections.ConfigDict({"optim": {"lr": 1e-4}, "data": {"train": ("a", "b"), "columns": {}}})
    run = Run(tmp_path, writer=True)
    run.write_json("config.json", config)
    assert run.read_json("config.json") == {"optim": {"lr": 1e-4}, "data": {"train": ["a", "b"], "columns": {}}}
    assert run.read_json("absent.json") is None


def test_full_disk_while_logging_loses_nothing_and_says_so(tmp_path, monkeypatch):
    run = Run(tmp_path, writer=True)
    train(run, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    real, calls = os.write, []

    def filling(fd, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:10])  # the last free block takes a part of the line

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(UserError, match="the disk is full"):
        run.log(4, values(4))
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run.log(4, values(4))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 4


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    run = Run(tmp_path, writer=True)
    run.write_json("summary.json", {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        run.write_json("summary.json", {"a": 2})
    assert run.read_json("summary.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_only_the_writer_writes(tmp_path):
    run = Run(tmp_path / "w", writer=False, use_tensorboard=True)
    run.log(1, {"loss": 1.0})
    run.write_json("a.json", {})
    run.write_lines("b.jsonl", [{}])
    run.resume_from(0)
    run.close()
    assert not (tmp_path / "w").exists()


def test_impossible_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "w"):
        with pytest.raises(UserError, match="--workdir="):
            Run(bad, writer=True)


# The bytes of these three events as the tensorboard package 2.20 frames and encodes them:
#   Event(wall_time=1.5, file_version="brain.Event:2"), Event(wall_time=1.5, step=301, session_log=SessionLog(status=START)),
#   Event(wall_time=1.5, step=300, summary={train/loss: 0.1, train/tokens: 8192}), each through its RecordWriter
GOLDEN = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "100000000000000095fbfe1809000000000000f83f10ad023a020801d17949d4"
    "36000000000000004f578cef09000000000000f83f10ac022a280a110a0a747261696e2f6c6f737315cdcccc3d0a130a0c747261696e2f746f6b656e73"
    "1500000046f21c8325"
)


def test_tensorboard_bytes_are_tensorboards_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.5)
    writer = tensorboard.Writer(tmp_path, purge_step=301)
    writer.scalars(300, {"train/loss": 0.1, "train/tokens": 8192.0})
    writer.close()
    assert next(tmp_path.iterdir()).read_bytes().hex() == GOLDEN


def test_resuming_purges_tensorboard_and_never_overwrites(tmp_path):
    with Run(tmp_path, writer=True, use_tensorboard=True) as run:
        train(run, 1, 6)
        run.resume_from(4)
        train(run, 5, 8)
    old, new = sorted((tmp_path / "tensorboard").iterdir())
    restart = b"\x10\x05\x3a\x02\x08\x01"  # step 5, session_log.status START
    assert restart not in old.read_bytes() and restart in new.read_bytes()
    assert struct.pack("<f", 3 / 8) in new.read_bytes()


def test_tensorboard_is_off_by_default(tmp_path):
    with Run(tmp_path, writer=True) as run:
        train(run, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_importing_run_initialises_no_jax():
    script = f"import sys, {run_module.__name__}; assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_one_process_at_a_time_trains_in_a_directory(tmp_path):
    other = [sys.executable, "-c", f"from sftjax.train.run import Run; Run({str(tmp_path)!r}, writer=True).lock(); print('in')"]
    Run(tmp_path, writer=True).lock()
    Run(tmp_path, writer=True).lock()  # a notebook that starts again is the same process
    gc.collect()
    refused = subprocess.run(other, capture_output=True, text=True)
    assert "another process is training here" in refused.stderr and not refused.stdout
    run_module.unlock(tmp_path)
    assert subprocess.run(other, capture_output=True, text=True).stdout == "in\n"
