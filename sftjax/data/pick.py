"""Rows picked from files, written as they stand there, every column: those that are good, a split's parts, a few at random.

Rows are read twice: once for what they say, of which hashes are kept, and once to be written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.config import UserError, default
from sftjax.data.formats import as_row, fail_on, layouts, open_source
from sftjax.data.lines import json_line, json_lines, whole
from sftjax.data.rows import mix, parted
from sftjax.data.sources import sources
from sftjax.data.survey import BAD, FATES, GOOD, Survey, sift, survey
from sftjax.hf.staging import swap, unfinished

Say = Callable[[str], None]
PARTS = ("train", "eval", "test")


def clean(
    spec: Any,
    out: str,
    config: ConfigDict | None = None,
    *,
    held: Any = None,
    want: str = "any",
    force: bool = False,
    say: Say = print,
) -> tuple[Survey, np.ndarray, Survey | None]:
    """Writes the good rows of `spec`, by the words of data/survey.py, to the JSON lines `out`; `held` names a held-out file.

    `config` is a whole config, which says how rows are read; None is the defaults. Returns what survey.sift does.
    """
    data, target = (config or default()).data, json_lines(out, force=force)
    one_layout(spec, data, want)
    found, fate, other = sift(spec, held, data, say, want)
    if not (fate == GOOD).any():
        reasons = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in tally(fate).items() if n)
        raise UserError(f"no row is good, so there is none to write ({reasons}); sftjax data check says which are what")
    with whole(target) as file:
        file.writelines(line for line, of in zip(lines(spec, data, want), fate.tolist()) if of == GOOD)
    return found, fate, other


def tally(fate: np.ndarray) -> dict[str, int]:
    """Rows by their fate."""
    return dict(zip(FATES, np.bincount(fate, minlength=len(FATES)).tolist()))


def split(
    spec: Any, out: str, config: ConfigDict | None = None, *, want: str = "any", force: bool = False, say: Say = print
) -> tuple[Survey, np.ndarray]:
    """Writes the parts that training with `config` would split `spec` into, to the directory `out`: train.jsonl, eval.jsonl and
    test.jsonl, those that have rows. Returns the survey and the part of every row, an index of PARTS or -1 for a bad row."""
    config = config or default()
    one_layout(spec, config.data, want)
    with folder(out, [f"{name}.jsonl" for name in PARTS], force=force) as place:
        found = usable(spec, config.data, want, say)
        said = found.said
        if len(np.unique(said["row"])) < len(said):
            raise UserError(
                f"{found.where(int(said['row'][0]))}: a tree holds several prompts, which belong to different parts; make "
                "rankings of it first: sftjax data convert"
            )
        part = np.full(len(found.rows), -1, np.int8)
        part[said["row"]] = parted(said["prompt"], said["key"], config.data.split, config.seed, say)
        with ExitStack() as stack:
            files = {
                number: stack.enter_context((place / f"{PARTS[number]}.jsonl").open("w", encoding="utf-8"))
                for number in np.unique(part[part >= 0]).tolist()
            }
            for line, number in zip(lines(spec, config.data, want), part.tolist()):
                if number in files:
                    files[number].write(line)
    return found, part


def select(
    spec: Any, out: str, rows: int, config: ConfigDict | None = None, *, want: str = "any", force: bool = False, say: Say = print
) -> tuple[Survey, np.ndarray]:
    """Writes `rows` rows of `spec` to the JSON lines `out`: those with the least seeded hashes of what they say, in their order.

    So the same rows are taken wherever they stand, and one that is added to the file takes the place of at most one other.
    Returns the survey and, of every row, whether it was taken.
    """
    config, target = config or default(), json_lines(out, force=force)
    if rows < 1:
        raise UserError(f"--rows={rows}: needs a number of rows, 1 or more")
    one_layout(spec, config.data, want)
    found = usable(spec, config.data, want, say)
    said = found.said[np.unique(found.said["row"], return_index=True)[1]]  # of a tree the first ranking
    _, alike, counts = np.unique(said["whole"], return_inverse=True, return_counts=True)
    nth = np.empty(len(said), np.uint64)  # of the rows that say the same, each has a hash of its own
    nth[np.argsort(alike, kind="stable")] = np.arange(len(said)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(mix(said["whole"] ^ mix(nth, 0), config.seed), kind="stable")
    taken = np.zeros(len(found.rows), bool)
    taken[said["row"][order[:rows]]] = True
    with whole(target) as file:
        file.writelines(line for line, take in zip(lines(spec, config.data, want), taken.tolist()) if take)
    return found, taken


def usable(spec: Any, data: ConfigDict, want: str, say: Say) -> Survey:
    """The survey of `spec`. Raises UserError where rows are bad, unless they are to be skipped, or where all are."""
    found = survey(spec, data, say, want)
    bad = int((found.rows["fate"] == BAD).sum())
    if data.on_bad_row == "error" or bad == len(found.rows):
        fail_on(found.bad, total=bad)
    return found


def one_layout(spec: Any, data: ConfigDict, want: str) -> None:
    """Raises UserError where sources are read in different ways: their rows cannot stand in one file."""
    found = [*layouts(spec, data, want).items()]
    for path, other in found[1:]:
        first, layout = found[0]
        alike = all(other.columns.get(name, own) == own for name, own in layout.columns.items())  # some may lack what others have
        if other.format != layout.format or not alike:
            raise UserError(
                f"{first} is read as {layout} and {path} as {other}, and one file is read in one way; take one at a time, or "
                "make one format of them first: sftjax data convert"
            )


def lines(spec: Any, data: ConfigDict, want: str) -> Iterator[str]:
    """Every row of the files as a line; "" for one that cannot be read."""
    for source in sources(spec):
        layout, rows = open_source(source, data, want)
        for _, _, row in rows:
            yield json_line(as_row(row)) if layout and isinstance(row, (dict, str)) else ""


@contextmanager
def folder(out: str, names: list[str], *, force: bool) -> Iterator[Path]:
    """A directory to write some of `names` in, which takes the place of `out` when the block ends well and vanishes when it does
    not. Raises UserError where `out` has such files already, unless `force`, or others."""
    target = Path(out).expanduser().resolve()
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if target.is_file() or held - {*names}:
        what = "a file" if target.is_file() else "a directory with other files"
        raise UserError(f"--out={out}: is {what}; name a new directory")
    if held and not force:
        raise UserError(f"--out={out}: exists already; give --force to write over it")
    if not target.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {target.parent}")
    fresh = unfinished(target)
    try:
        fresh.mkdir()
        yield fresh
        swap(fresh, target)
    except OSError as e:
        raise UserError(f"--out={out}: cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
