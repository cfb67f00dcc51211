"""An export appears whole or not at all: it is written beside its place and renamed into it.

.NAME.HOST.PID.HEX.tmp   on its way, of the process PID of HOST; what a killed one left is removed when the next begins
.NAME.HOST.PID.HEX.old   what it takes the place of, for a moment
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from sftjax.config import UserError

DAY = 24 * 60 * 60
MARK = "sftjax_export.json"  # says that a directory is ours to replace


@contextmanager
def staged(out: str | Path, source: str | Path) -> Iterator[Path]:
    """A directory to write in, which takes `out`'s place when the block ends well and vanishes when it does not.

    `out` may be absent, empty, or an earlier export; anything else is refused with a UserError.
    """
    out = Path(out).expanduser().resolve()
    if out == Path(source).resolve():
        raise UserError(f"{out}: is the model the run started from; choose another directory for the export")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARK).is_file())):
        raise UserError(f"{out}: exists and is not an export of sftjax; remove it or choose another directory")
    tmp = unfinished(out)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        (tmp / MARK).write_text(json.dumps({"sftjax": version("sftjax")}) + "\n")
        swap(tmp, out)
    except OSError as e:
        place = f", {e.filename}" if e.filename and not Path(e.filename).is_relative_to(tmp) else ""
        why = "no space left on the disk" if e.errno == errno.ENOSPC else f"cannot be made ({e.strerror or e}{place})"
        raise UserError(f"{out}: {why}; nothing was changed there") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def unfinished(place: Path) -> Path:
    """A name beside `place` for what will take it, unlike any other's. What processes that are no more left there is removed."""
    owned = re.compile(rf"\.{re.escape(place.name)}\.(.+)\.(\d+)\.[0-9a-f]{{8}}\.(tmp|old)")
    for path in place.parent.glob(".*"):
        named = owned.fullmatch(path.name)
        if not named or (named[3] == "old" and not place.exists()):  # killed between two renames: this is all there is
            continue
        if abandoned(path, named[1], int(named[2])):
            shutil.rmtree(path, ignore_errors=True)
    return place.with_name(f".{place.name}.{host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def abandoned(path: Path, owner: str, pid: int) -> bool:
    """Whether the process that wrote a directory is gone, or has not touched it for a day."""
    if owner == host():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's, alive
    try:
        return max(each.stat().st_mtime for each in (path, *path.iterdir())) < time.time() - DAY
    except OSError:
        return False  # it is moving


def host() -> str:
    """This machine, and where its process numbers count: a container may have its host's name and others' numbers."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def swap(tmp: Path, out: Path) -> None:
    old = tmp.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        tmp.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
