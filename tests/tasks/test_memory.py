"""What a run may take less memory with changes what is kept of it, and nothing of what it learns: it resumes to the bit."""

import json
import shutil

import pytest

from sftjax import tasks

KINDS = {
    "float16": {"model.dtype": "float16"},
    "8-bit moments": {"optim.name": "adamw_8bit"},
    "moments in the host": {"optim.offload": True},
}


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    return tasks.train(config(toy), tmp_path_factory.mktemp("plain"))


def config(toy, **changes):
    return toy.config(
        **{"method": "full", "optim.lr": 3e-3, "train.steps": 6, "train.save_every": 3, "train.eval_every": 0} | changes
    )


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_as_without_and_resumes(name, toy, plain, tmp_path):
    c = config(toy, **KINDS[name])
    summary = tasks.train(c, tmp_path / "run")
    assert summary["eval_loss"] < 0.95 * summary["eval_loss_before"]
    assert summary["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.02)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / "6")
    assert tasks.train(c, again)["eval_loss"] == summary["eval_loss"]
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (tmp_path / "run", again)]
    told = [[(m["step"], m["loss"], m["grad_norm"], m.get("loss_scale")) for m in ms if m["kind"] == "train"] for ms in lines]
    assert told[0] == told[1]
