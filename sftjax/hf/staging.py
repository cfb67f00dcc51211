"""An export appears whole or not at all: it is written beside its place and renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from sftjax.config import UserError

MARK = "sftjax_export.json"  # says that a directory is ours to replace, and what it was made from


@contextmanager
def staged(out: str | Path, source: str | Path) -> Iterator[Path]:
    """A directory to write in, which takes `out`'s place when the block ends well and vanishes when it does not.

    `out` may be absent, empty, or an earlier export; anything else is refused with a UserError.
    """
    out = Path(out).expanduser().absolute()
    if out.resolve() == Path(source).resolve():
        raise UserError(f"{out}: is the model the run started from; choose another directory for the export")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file())):
        raise UserError(f"{out}: exists and is not an export of sftjax; remove it or choose another directory")
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        tmp.mkdir(parents=True)
        yield tmp
        (tmp / MARK).write_text(json.dumps({"sftjax": version("sftjax"), "source": str(source)}) + "\n")
        _swap(tmp, out)
    except OSError as e:
        place = f", {e.filename}" if e.filename and not Path(e.filename).is_relative_to(tmp) else ""
        why = "no space left on the disk" if e.errno == errno.ENOSPC else f"cannot be made ({e.strerror or e}{place})"
        raise UserError(f"{out}: {why}; nothing was changed there") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _swap(tmp: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        tmp.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
