"""The loop: compiled once, read late, stopped by bad numbers or by patience, kept from going on as another run."""

import gc
import json
import math
import shutil

import jax
import numpy as np
import pytest
import toy as worlds

from sftjax import tasks
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.sharding import make_mesh
from sftjax.tasks.export import export
from sftjax.train import meter, progress
from sftjax.train.evaluation import evaluator
from sftjax.train.meter import Tally


def metrics(workdir, kind="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def kept(workdir):
    return sorted(int(d.name) for d in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def train(toy):
    return lambda workdir, force=False, **changes: tasks.train(toy.config(**changes), workdir, force=force)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """`finished(to)` copies a run of 12 steps, evaluated and saved at 6 and 12; `finished.summary` is its summary."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    summary = train(workdir, **{"train.eval_every": 6, "train.log_every": 3})

    def copy(to):
        return shutil.copytree(workdir, to / "run")

    copy.summary = summary
    return copy


def test_compiled_once_and_read_seldom(train, tmp_path, monkeypatch, caplog):
    """One program for all steps, whatever they hold, in whose state's memory the next one is; the device is waited for at most
    twice an interval of logging."""
    reads, places = [], []
    compile = jax.stages.Lowered.compile

    def noted(lowered):
        state = jax.tree.leaves(lowered.args_info[0][0])
        assert all(x.donated for x in state)
        compiled = compile(lowered)
        places.append((compiled.memory_analysis().alias_size_in_bytes, sum(math.prod(x.shape) * x.dtype.itemsize for x in state)))
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", noted)
    monkeypatch.setattr(meter.jax, "device_get", lambda x: reads.append(1) or jax.tree.map(np.asarray, x))
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        train(tmp_path / "run", **{"train.steps": 40, "train.eval_every": 0, "train.log_every": 20})
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(step)")]
    assert len(compiled) == len(places) == 1, compiled
    assert places[0][0] >= places[0][1] > 0
    # two while warming up, one after step 20, one at the end; the evaluations before, after, and of the test rows
    assert len(reads) == 2 + 1 + 1 + 3
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 41))


def test_metrics_are_read_a_step_late(monkeypatch, train, tmp_path):
    behind = []
    add, read = meter.Meter.add, meter.Meter.read

    def noted(self, step, m):
        self.newest = step
        add(self, step, m)

    def watched(self, upto):
        behind.append((self.newest, self.newest - upto))
        read(self, upto)

    monkeypatch.setattr(meter.Meter, "add", noted)
    monkeypatch.setattr(meter.Meter, "read", watched)
    train(tmp_path / "run", **{"train.log_every": 4, "train.eval_every": 0})
    assert set(behind) == {(1, 0), (2, 0), (5, 1), (9, 1), (12, 0)}


def test_summary_says_what_the_run_did(finished, tmp_path):
    summary = finished.summary
    lines = metrics(finished(tmp_path))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == len(lines) == 12
    assert summary["tokens"] == sum(line["tokens"] for line in lines)
    assert 0 < summary["trained_tokens"] == sum(line["trained_tokens"] for line in lines) < summary["tokens"]
    assert summary["eval_loss"] == metrics(tmp_path / "run", "eval")[-1]["loss"] < summary["eval_loss_before"]
    assert summary["rows"] == {"read": 72, "kept": 72, "dropped": {}}
    for name in ("tokens_per_s", "steady_tokens_per_s", "compile_s", "first_step_s", "total_s", "peak_memory_mib"):
        assert summary[name] > 0
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_mfu_is_told_where_the_devices_peak_is_known(train, finished, tmp_path, monkeypatch):
    assert finished.summary["mfu"] is None
    monkeypatch.setattr(progress, "peak_flops", lambda _: 1e9)
    got = train(tmp_path / "run", **{"train.eval_every": 0})
    assert got["mfu"] > 0 and "MFU" in (tmp_path / "run" / "report.html").read_text()


def test_evaluation_does_not_depend_on_its_batches(train, finished, tmp_path):
    """7 held-out rows of several lengths in 1, 3 or 4 rows a batch: a mean over tokens, not over batches."""
    for rows in (1, 3):
        got = train(tmp_path / f"{rows}", **{"eval.batch_size": rows, "train.eval_every": 6, "train.log_every": 3})
        for name in ("eval_loss_before", "eval_loss", "test_loss"):
            assert got[name] == pytest.approx(finished.summary[name], rel=2e-6)


def test_evaluation_weighs_by_what_counts():
    """Two batches, of 2 and 3 tokens, with log-likelihoods of 10 and 300 in all."""

    def loss(params, batch, key):
        count = batch.weights.sum()
        return 2 * count, count, {"nll": jax.numpy.where(count == 2, 10.0, 300.0), "rewards/margins": count**2}

    mesh = make_mesh(data=1)
    batches = [Batch(*[np.ones((1, n), np.float32)] * 4) for n in (2, 3)]
    got = evaluator(loss, {}, mesh)({}, batches)
    assert got == {"loss": 2, "count": 5, "ppl": pytest.approx(np.exp(62.0), rel=1e-5), "rewards/margins": (4 + 9) / 5}
    assert evaluator(loss, {}, mesh)({}, []) == {}


def test_best_is_the_lowest_and_never_nan():
    tally = Tally()
    assert not tally.evaluated(1, {"loss": float("nan")})
    assert tally.evaluated(2, {"loss": 2.0})
    assert not tally.evaluated(3, {"loss": 2.0})
    assert not tally.evaluated(4, {"loss": float("nan")})
    assert (tally.best, tally.stale) == ({"step": 2, "loss": 2.0}, 2)
    assert tally.stale_for(2)
    assert not tally.stale_for(3)
    assert not tally.stale_for(0)
    assert tally.evaluated(5, {"loss": 1.0})
    assert tally.stale == 0


def test_nothing_held_out_is_no_evaluation(train, tmp_path):
    whole = {"data.split": (1, 0, 0), "train.eval_every": 2}
    with pytest.raises(UserError, match=r"train\.patience=1: no rows are held out"):
        train(tmp_path / "run", **whole, **{"train.patience": 1})
    got = train(tmp_path / "run", **whole)
    assert got["steps"] == 12
    assert got["eval_loss"] is None
    with pytest.raises(UserError, match="never evaluated; use --checkpoint=last"):
        export(tmp_path / "run", out=tmp_path / "out", checkpoint="best")


# nothing moves: the first evaluation stays the best
STALE = {"optim.lr": 0.0, "train.steps": 60, "train.eval_every": 4, "train.patience": 2, "train.keep": 1}


@pytest.fixture(scope="module")
def stale(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stale") / "run"
    return workdir, train(workdir, **STALE)


def test_stops_early_with_the_best_kept(stale):
    workdir, summary = stale
    losses = {line["step"]: line["loss"] for line in metrics(workdir, "eval")}
    assert list(losses) == [0, 4, 8, 12]
    assert summary["best"] == {"step": 4, "loss": losses[4]}
    assert summary["steps"] == 12
    assert kept(workdir) == [4, 12]


def test_what_stopped_early_stays_stopped(train, stale, tmp_path):
    workdir, summary = stale
    again = train(shutil.copytree(workdir, tmp_path / "run"), **STALE)
    assert again["steps"] == summary["steps"]
    assert kept(tmp_path / "run") == kept(workdir)


@pytest.mark.parametrize("which", ["best", "last", "step"])
def test_each_checkpoint_can_be_exported(stale, tmp_path, which):
    workdir, summary = stale
    names = {"step": str(summary["best"]["step"]), "wrong": "3"}
    said = []
    if which == "wrong":
        with pytest.raises(
            UserError, match=rf"--checkpoint=3: needs last, best or one of {kept(workdir)[0]}, {kept(workdir)[1]}"
        ):
            export(workdir, out=tmp_path / "out", checkpoint="3")
        return
    export(workdir, out=tmp_path / "out", checkpoint=names.get(which, which), say=said.append)
    step = summary["steps"] if which == "last" else summary["best"]["step"]
    assert f"wrote step {step} " in said[-1]


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(stale, tmp_path):
    workdir, _ = stale
    with pytest.raises(UserError, match="--checkpoint=3: needs last, best or one of {}, {}".format(*kept(workdir))):
        export(workdir, out=tmp_path / "out", checkpoint="3")


def test_bad_steps_change_nothing_are_counted_and_stop_the_run(train, tmp_path):
    """A learning rate past all bounds makes the weights infinite: every step after it is bad."""
    wild = {
        "optim.name": "sgd",
        "optim.lr": 1e38,
        "optim.warmup": 0,
        "optim.clip": 0.0,
        "train.eval_every": 0,
        "train.log_every": 2,
    }
    with pytest.raises(UserError, match="not finite for 4 steps in a row, and none of them changed the model; try a lower"):
        train(tmp_path / "run", **wild, **{"train.max_bad_steps": 4})
    lines = metrics(tmp_path / "run")
    assert lines[0]["bad"] == 0
    assert [line["bad"] for line in lines[-4:]] == [1, 2, 3, 4]
    assert lines[-1]["loss"] is None  # not finite: no number that JSON has
    got = train(tmp_path / "whole", **wild, **{"train.max_bad_steps": 99})
    assert got["skipped_steps"] == metrics(tmp_path / "whole")[-1]["skipped"] >= 10


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"optim.lr": 1e-3}, "config.optim.lr: 0.02 -> 0.001"),
        ({"train.steps": 20}, "config.train.steps: 12 -> 20"),
        ({"data.max_length": 63}, "config.data.max_length: 64 -> 63"),
    ],
)
def test_another_config_is_refused_with_the_difference(train, finished, tmp_path, changes, shown):
    with pytest.raises(UserError) as refused:
        train(finished(tmp_path), **{"train.eval_every": 6, **changes})
    assert shown in str(refused.value)
    assert "use another --workdir, or --force" in str(refused.value)
    assert kept(tmp_path / "run") == [6, 12]


def test_a_refused_run_leaves_the_directory_as_it_was(train, finished, tmp_path):
    workdir = finished(tmp_path)
    (workdir / "rejected.jsonl").write_text("the other run's")
    before = {f: f.read_bytes() for f in workdir.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="holds a run of something else"):
        train(workdir, **{"data.max_length": 63})
    assert {f: f.read_bytes() for f in workdir.rglob("*") if f.is_file()} == before


def test_what_was_dropped_is_written_down(train, tmp_path):
    train(tmp_path / "run", **{"data.max_length": 50, "train.steps": 1})
    rows = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert rows and all("data.max_length=50" in row["reason"] and row["line"] for row in rows)


def test_other_data_and_another_base_are_refused(toy, train, finished, tmp_path):
    workdir = finished(tmp_path)
    data = tmp_path / "colours.jsonl"
    data.write_text(toy.data.read_text().replace("blue", "pink"))
    with pytest.raises(UserError, match="data: contents changed"):
        train(workdir, **{"train.eval_every": 6, "data.train": (str(data),)})
    base = shutil.copytree(toy.base, tmp_path / "base")
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="base: contents changed"):
        train(workdir, **{"train.eval_every": 6, "model.path": str(base)})


def test_force_goes_on_with_the_new_config(train, finished, tmp_path):
    workdir = finished(tmp_path)
    longer = {"train.eval_every": 6, "train.steps": 16}
    assert train(workdir, force=True, **longer)["steps"] == 16
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 17))
    assert train(workdir, **longer)["steps"] == 16  # the new config is now the run's own


@pytest.mark.parametrize("changes, told", [({"lora.rank": 4}, "16] where this config makes"), ({"optim.name": "sgd"}, "nothing")])
def test_what_force_cannot_go_on_with_leaves_the_run_as_it_was(train, finished, tmp_path, changes, told):
    workdir, what = finished(tmp_path), ("config.json", "manifest.json", "metrics.jsonl")
    before = [(workdir / name).read_bytes() for name in what]
    with pytest.raises(UserError, match="go on with the config that it was made by") as refused:
        train(workdir, force=True, **{"train.eval_every": 6} | changes)
    assert told in str(refused.value)
    assert [(workdir / name).read_bytes() for name in what] == before
    assert train(workdir, **{"train.eval_every": 6})["steps"] == 12


def test_keys_that_change_nothing_computed_are_free(train, finished, tmp_path):
    free = {"train.log_every": 1, "train.keep": 5, "train.max_bad_steps": 1, "data.workers": 2, "train.save_every": 3}
    assert train(finished(tmp_path), **{"train.eval_every": 6} | free)["steps"] == 12


def test_a_base_that_moved_is_the_same_base(toy, train, finished, tmp_path):
    moved = shutil.copytree(toy.base, tmp_path / "base")
    assert train(finished(tmp_path), **{"train.eval_every": 6, "model.path": str(moved)})["steps"] == 12


def test_a_resumed_run_holds_its_state_once(train, tmp_path, monkeypatch):
    """What is alive at the first step of a resumed run is what was alive at that of a fresh one."""
    held, add = [], meter.Meter.add

    def counted(self, step, metrics):
        held.append(sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted()))
        add(self, step, metrics)

    monkeypatch.setattr(meter.Meter, "add", counted)
    changes = {"method": "full", "train.steps": 2, "train.save_every": 1}
    train(tmp_path / "run", **changes)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())
    train(tmp_path / "run", **changes)
    fresh, _, resumed = held
    assert resumed - before < 1.1 * fresh


def test_a_run_goes_on_over_another_mesh(train, finished, tmp_path):
    """From one device to eight, with nothing to force: what follows agrees with one device's to rounding."""
    workdir = finished(tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "12")
    got = train(workdir, **{"train.eval_every": 6, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2})
    assert got["steps"] == 12
    assert got["eval_loss"] == pytest.approx(finished.summary["eval_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose matrices are large enough for Adafactor to factor."""
    return worlds.make_base(tmp_path_factory.mktemp("wide") / "base", hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_whatever_the_optimiser_holds_fits_the_next_step_on_every_mesh(train, wide, tmp_path, optimizer):
    changes = {"model.path": str(wide), "method": "full", "optim.name": optimizer, "optim.lr": 1e-3, "train.steps": 3}
    one = train(tmp_path / "one", **changes)
    many = train(tmp_path / "many", **changes, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert many["steps"] == 3
    assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-3)
