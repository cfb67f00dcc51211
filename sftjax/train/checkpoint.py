"""Checkpoints: the state of a step and a few numbers beside it, written by orbax while training goes on.

A checkpoint is a flat dict `{path of the array in the state: array}` and a JSON of extras. Orbax writes into a temporary
directory and renames it, so a checkpoint is whole or absent; the last `keep` stay, and the best by evaluation loss.
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sftjax import hosts
from sftjax.config import UserError
from sftjax.data.lines import troubles
from sftjax.train.files import in_bucket


class Restored(NamedTuple):
    step: int
    state: Any
    extras: dict[str, Any]


@dataclass
class LastAndBest:
    """Which checkpoints stay: the newest `keep`, at least one, and the one of step `best`."""

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = checkpoints[-max(self.keep, 1) :]
        return [c in newest or c.step == self.best for c in checkpoints]


class Checkpoints:
    """`with Checkpoints(dir, keep=2) as c: c.save(step, state, extras, best=10); c.restore(like)`."""

    def __init__(self, directory: Path, *, keep: int = 2, say: Callable[[str], None] = print, read_only: bool = False):
        hush_orbax()
        self.directory, self.say = directory, say
        self.kept = LastAndBest(keep)
        # a reader is one host alone; writers all go by what the first of them sees in the directory that they share
        alone = read_only and hosts.many()
        self.failed = (lambda reason: [reason] * bool(reason)) if alone else hosts.which
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.kept,
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=hosts.many() and not alone,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0} if alone else None, barrier_sync_key_prefix="alone" if alone else None
            ),
            cleanup_tmp_directories=not read_only,  # a reader's run may be writing there
            read_only=read_only,
            create=not read_only,
        )
        self.manager = ocp.CheckpointManager(directory if in_bucket(directory) else directory.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self.manager.close()

    def steps(self) -> list[int]:
        """Of the checkpoints that are whole on disk, in order."""
        self.manager.reload()  # it counts one whose writing failed, until told to look
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, extras: dict[str, Any], best: int | None = None) -> None:
        """Starts writing; `best` is the step whose checkpoint stays however old it gets.

        `extras` is written later: it must not change. Raises UserError where an earlier write, or this one's start, found
        the disk full.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(named(state)), extras=ocp.args.JsonSave(extras))
        self.kept.best = best
        with self._writing():
            self.manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Until everything started is on disk."""
        with self._writing():
            self.manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None, *, part: bool = False) -> Restored | None:
        """The state at `step`, or the newest that can be read, shaped and placed like `like`; None where there is none.

        `like` holds arrays or ShapeDtypeStructs with shardings. With `part` it may hold less than was saved, and
        no more is read. Raises UserError where there are checkpoints and none can be read.
        """
        names, structure = list(named(like)), jax.tree_util.tree_structure(like)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, named(like))
        if not part:
            self._refuse_other_shapes(target, step)
        wanted = ocp.args.StandardRestore(target)
        if part:
            places = ocp.checkpoint_utils.construct_restore_args(target)
            wanted = ocp.args.PyTreeRestore(target, places, partial_restore=True)
        found = self._read(step, state=wanted, extras=ocp.args.JsonRestore())
        if found is None:
            return None
        step, items = found
        return Restored(step, jax.tree.unflatten(structure, [items.state[name] for name in names]), items.extras)

    def extras(self) -> dict[str, Any] | None:
        """Those of the newest checkpoint that can be read."""
        found = self._read(None, extras=ocp.args.JsonRestore())
        return found[1].extras if found else None

    def _read(self, step: int | None, **items: Any) -> tuple[int, Any] | None:
        steps = self.steps() if step is None else [step]
        for candidate in reversed(steps):
            found, reason = None, ""
            try:
                found = self.manager.restore(candidate, args=ocp.args.Composite(**items))
            except (ValueError, OSError, KeyError) as e:
                reason = first_line(e)
            if not (failed := self.failed(reason)):
                return candidate, found
            reason = reason or f"on host {failed[0]}"
            if step is None and candidate != steps[0]:
                self.say(f"checkpoint {candidate} cannot be read ({reason}); going back to the one before")
        if step is not None:
            raise UserError(f"{self.directory / str(step)}: this checkpoint cannot be read ({reason})")
        if steps:
            raise UserError(f"{self.directory}: none of its checkpoints can be read ({reason}); delete them to start anew")
        return None

    def _refuse_other_shapes(self, target: dict[str, Any], step: int | None) -> None:
        """Of the newest whose contents can be listed. Raises UserError, where orbax would speak of its own options."""
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                saved = ocp.StandardCheckpointHandler().metadata(self.directory / str(candidate) / "state")
            except (ValueError, OSError, KeyError):
                continue  # damaged
            shapes = {name: tuple(x.shape) for name, x in saved.items()}
            wanted = {name: tuple(x.shape) for name, x in target.items()}
            other = [name for name in shapes | wanted if shapes.get(name) != wanted.get(name)]
            if other:
                first = min(other, key=lambda name: not name.startswith("trainable"))
                was, now = ("nothing" if x is None else list(x) or "a number" for x in (shapes.get(first), wanted.get(first)))
                raise UserError(
                    f"{self.directory / str(candidate)}: of {first} it holds {was} where this config makes {now}; go on with the "
                    "config that it was made by, or use another --workdir"
                )
            return

    def forget_after(self, step: int) -> None:
        """Deletes what a resumed run will write again."""
        for later in [s for s in self.steps() if s > step]:
            self.manager.delete(later)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says the several ways in which a full disk shows, and what a bucket refuses, in one sentence."""
        try:
            yield
        except Exception as e:
            if any(says_full(seen) for seen in causes(e)):
                steps = self.steps()
                kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint was written yet"
                what = f"the disk is full; {kept}: free some space"
            elif in_bucket(self.directory) and isinstance(e, (ValueError, *troubles(self.directory))):
                what = f"cannot be written ({first_line(e)}); mend that"
            else:
                raise
            raise UserError(f"{self.directory}: {what} and run the same command again") from e


@functools.cache
def hush_orbax() -> None:
    """Orbax raises what goes wrong, but first prints pages of it: logs, and each of the other reads and writes under way,
    which it leaves behind unfinished."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (inspect.iscoroutine(unraisable.object) or str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def causes(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__


def says_full(e: BaseException) -> bool:
    return getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e) or "quota exceeded" in str(e)


def named(state: Any) -> dict[str, Any]:
    """`{"trainable/layers/attn/q/kernel.a": array}`: every array of the state under its path."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
