"""Checkpoints: the state of a step and a few numbers beside it, written by orbax while training goes on.

A checkpoint is a flat dict `{path of the array in the state: array}` and a JSON of extras. Orbax writes into a temporary
directory and renames it, so a checkpoint is whole or absent; the last `keep` stay, and the best by evaluation loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from sftjax.config import UserError


class Restored(NamedTuple):
    step: int
    state: Any
    extras: dict[str, Any]


class Checkpoints:
    """`with Checkpoints(dir, keep=2) as c: c.save(step, state, extras, loss=1.2); c.restore(like)`."""

    def __init__(self, directory: Path, *, keep: int = 2, say: Callable[[str], None] = print):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file it writes
        self.directory, self.say = directory, say
        policy = managers.AnyPreservationPolicy(
            [
                managers.LatestN(keep),
                managers.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, extras: dict[str, Any], loss: float | None = None) -> None:
        """Starts writing; raises UserError where an earlier write, or this one's start, found the disk full."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(named(state)), extras=ocp.args.JsonSave(extras))
        with self._full_disk():
            self.manager.save(step, args=items, metrics=None if loss is None else {"loss": loss}, force=True)

    def wait(self) -> None:
        """Until everything started is on disk."""
        with self._full_disk():
            self.manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The state at `step`, or the newest that can be read, shaped and placed like `like`; None where there is none."""
        names, structure = list(named(like)), jax.tree_util.tree_structure(like)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named(like))
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                items = self.manager.restore(
                    candidate, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), extras=ocp.args.JsonRestore())
                )
            except (ValueError, OSError, KeyError) as e:
                if step is not None:
                    raise UserError(f"{self.directory / str(step)}: this checkpoint cannot be read ({first_line(e)})") from e
                self.say(f"checkpoint {candidate} cannot be read ({first_line(e)}); going back to the one before")
                continue
            return Restored(candidate, jax.tree.unflatten(structure, [items.state[name] for name in names]), items.extras)
        return None

    def forget_after(self, step: int) -> None:
        """Deletes what a resumed run will write again."""
        for later in [s for s in self.steps() if s > step]:
            self.manager.delete(later)

    def _full_disk(self) -> _FullDisk:
        return _FullDisk(self)


class _FullDisk:
    """Turns the several ways in which a full disk shows into one sentence that names the last good checkpoint."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        seen = error
        while seen is not None:
            if "No space left" in str(seen) or "RESOURCE_EXHAUSTED" in str(seen) or getattr(seen, "errno", None) == 28:
                steps = self.checkpoints.steps()
                kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint was written yet"
                raise UserError(
                    f"{self.checkpoints.directory}: the disk is full; {kept}: free some space and run the same command again"
                ) from error
            seen = seen.__cause__ or seen.__context__


def named(state: Any) -> dict[str, Any]:
    """`{"trainable/layers/attn/q/kernel.a": array}`: every array of the state under its path."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
