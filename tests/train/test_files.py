"""A run's files in a bucket, and what is said where there is none. On a disk: test_run.py."""

import json
import sys

import fake_gcs
import jax.numpy as jnp
import pytest

from sftjax.config import UserError
from sftjax.train import files
from sftjax.train.checkpoint import Checkpoints
from sftjax.train.run import Run


@pytest.fixture
def bucket(monkeypatch):
    from gcsfs import GCSFileSystem

    GCSFileSystem.clear_instance_cache()
    with fake_gcs.serving("runs") as (held, env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield held
    GCSFileSystem.clear_instance_cache()


def lines(bucket, name):
    return [json.loads(line)["step"] for line in bucket.objects[name].data.splitlines()]


def test_what_grows_is_there_when_asked_for_and_goes_on(bucket, monkeypatch):
    with Run("gs://runs/a", writer=True, use_tensorboard=True) as run:
        run.log(1, {"loss": 1.0})
        assert "a/metrics.jsonl" not in bucket.objects  # nothing is written at every line
        run.flush()
        run.log(2, {"loss": 1.0})
        assert lines(bucket, "a/metrics.jsonl") == [1]
        monkeypatch.setattr(files, "UPLOAD", 0.0)
        run.log(3, {"loss": 1.0})
        assert lines(bucket, "a/metrics.jsonl") == [1, 2, 3]
        run.log(4, {"loss": 1.0})
    with Run("gs://runs/a", writer=True) as run:
        run.resume_from(2)
        run.log(3, {"loss": 0.5})
        assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
        run.write_json("summary.json", {"a": 1})
        assert run.read_json("summary.json") == {"a": 1}
    assert any(name.startswith("a/tensorboard/events") for name in bucket.objects)


def test_a_closed_bucket_is_one_sentence(bucket):
    run = Run("gs://runs/a", writer=True)
    run.log(1, {"loss": 1.0})
    sentence = r"gs://runs/a/checkpoints: cannot be written .* run the same command again"
    with pytest.raises(UserError, match=sentence), Checkpoints(run.checkpoints) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
        checkpoints.wait()
        bucket.down = True
        checkpoints.save(2, {"x": jnp.ones(3)}, {})
    with pytest.raises(UserError, match=r"gs://runs/a: cannot be written .* to resume"):
        run.flush()
    bucket.down = False
    with Checkpoints(run.checkpoints) as checkpoints:
        assert checkpoints.steps() == [1]


def test_directories_that_cannot_be_are_told(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"--out=s3://b/x: needs a local directory, or one in a bucket as gs://"):
        files.directory("s3://b/x", "--out")
    with pytest.raises(UserError, match=r"--workdir=gs://other/x: cannot be made or written \(there is no such bucket"):
        Run("gs://other/x", writer=True)
    bucket.down = True
    with pytest.raises(UserError, match="--workdir=gs://runs/x: the bucket cannot be reached"):
        files.directory("gs://runs/x")
    monkeypatch.setitem(sys.modules, "gcsfs.retry", None)
    with pytest.raises(UserError, match=r"gs://runs/x: a bucket needs the package gcsfs; pip install 'sftjax\[gcs\]'"):
        files.directory("gs://runs/x")
