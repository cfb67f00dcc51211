"""A run's files, on a disk or in a bucket (`gs://bucket/path`): its directory, what is written whole, what grows.

On a disk a file is written beside its place, synced and renamed, and what grows is appended to. In a bucket an object is there
whole or not at all, and nothing can be appended to: what grows is held here and written anew, every UPLOAD seconds at most and
when asked. A bucket has no locks.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from sftjax.config import UserError
from sftjax.data.lines import reason, troubles

UPLOAD = 30.0  # seconds


def directory(place: str | os.PathLike[str], option: str = "--workdir") -> Path:
    """The path of a run's directory; of one in a bucket it has pathlib's methods and is no pathlib.Path. Raises UserError that
    names the `option` that asked for it."""
    if "://" not in str(place):
        return Path(place).expanduser()
    if not str(place).startswith("gs://"):
        raise UserError(f"{option}={place}: needs a local directory, or one in a bucket as gs://BUCKET/PATH")
    known = troubles(place)
    import fsspec
    from etils import epath

    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # other hosts write there too
    path = cast(Path, epath.Path(place))
    try:
        path.exists()
    except known as e:
        raise UserError(f"{option}={place}: the bucket cannot be reached ({reason(e)})") from e
    return path


def in_bucket(path: Path) -> bool:
    return not isinstance(path, Path)


def make(path: Path, option: str = "--workdir") -> None:
    """Makes the directory, and tries that it can be written. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if in_bucket(path):
            probe = path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        elif not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except troubles(path) as e:
        why = "there is no such bucket" if in_bucket(path) and isinstance(e, FileNotFoundError) else reason(e)
        raise UserError(f"{option}={path}: cannot be made or written ({why}); choose another directory") from e


def replace(path: Path, data: bytes) -> None:
    """`path` holds `data`, or what it held before: never a part. Survives a power cut."""
    if in_bucket(path):
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


class Growing(Protocol):
    """A file that grows by whole pieces."""

    def add(self, data: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def growing(path: Path) -> Growing:
    return InBucket(path) if in_bucket(path) else OnDisk(path)


class OnDisk:
    """What was added is in the kernel's hands, so `kill -9` loses none; what a full disk cuts short is taken back."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, data: bytes) -> None:
        start = os.fstat(self.fd).st_size
        try:
            done = 0
            while done < len(data):  # a disk about to be full takes a part, then refuses the rest
                done += os.write(self.fd, data[done:])
        except OSError:
            os.ftruncate(self.fd, start)
            raise

    def flush(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.fd)


class InBucket:
    def __init__(self, path: Path):
        self.path, self.written, self.new = path, time.monotonic(), False
        self.held = bytearray(path.read_bytes() if path.exists() else b"")

    def add(self, data: bytes) -> None:
        self.held += data
        self.new = True
        if time.monotonic() - self.written > UPLOAD:
            self.flush()

    def flush(self) -> None:
        if self.new:
            self.path.write_bytes(bytes(self.held))
            self.written, self.new = time.monotonic(), False

    def close(self) -> None:
        self.flush()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Says a full disk, or a bucket that takes nothing, in one sentence instead of a traceback."""
    try:
        yield
    except troubles(where) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or in_bucket(where)):
            raise
        what = "the disk is full; free some space" if full else f"cannot be written ({reason(e)}); mend that"
        raise UserError(f"{where}: {what} and run the same command again to resume") from e
