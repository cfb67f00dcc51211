"""Run: a working directory, and everything written into it but the checkpoints.

    W/config.json  manifest.json  summary.json  report.html  samples.jsonl  rejected.jsonl
    W/metrics.jsonl  {"step": 20, "kind": "train", "loss": 1.31, "lr": 0.0002, "grad_norm": 0.4, "tokens_per_s": 8123.0}
                     {"step": 20, "kind": "eval", "loss": 1.42}
                     {"step": 20, "kind": "sample", "answers": [{"prompt", "expected", "text", "stopped", "exact"}]}
    W/tensorboard/   W/checkpoints/

A JSON file is whole or absent. A line of metrics is in the kernel's hands when `log` returns, so `kill -9` loses none; in a
bucket it is there after the next `flush`. What resuming needs of its caller: a step's metrics are logged and flushed before its
checkpoint is saved, and `resume_from(step)` is called before the first `log`. Only process 0 writes; elsewhere every method does
nothing.
"""

from __future__ import annotations

import fcntl
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sftjax.config import UserError
from sftjax.train import files, tensorboard
from sftjax.train.files import replace, writing

# A lock is the process's: it is gone as soon as any descriptor of its file is closed, so there is one, whatever runs there are.
LOCKS: dict[Path, int] = {}


def unlock(workdir: str | os.PathLike[str]) -> None:
    """Lets other processes train in this directory."""
    if (fd := LOCKS.pop((Path(workdir).expanduser() / ".lock").resolve(), None)) is not None:
        os.close(fd)


class Run:
    """`with Run("runs/mine") as run: run.resume_from(0); run.log(10, {"loss": 1.3})`.

    `writer` None means: is this jax process 0? Raises UserError, which names the `option` that asked for the directory, where it
    cannot be made or written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        use_tensorboard: bool = False,
        writer: bool | None = None,
        option: str = "--workdir",
    ):
        if writer is None:
            import jax

            writer = jax.process_index() == 0
        self.workdir = files.directory(workdir, option)
        self.writer = writer
        self.use_tensorboard = use_tensorboard
        self.purge_step: int | None = None
        self.metrics: files.Growing | None = None
        self.events: tensorboard.Writer | None = None
        if writer:
            files.make(self.workdir, option)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lock(self) -> None:
        """Keeps other processes from this directory until `unlock`, or this one's end. Raises UserError where one has it."""
        if not self.writer or files.in_bucket(self.workdir):
            return
        path = (self.workdir / ".lock").resolve()
        if path in LOCKS:
            return
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise UserError(f"{path}: cannot be opened ({e.strerror}); choose another --workdir, or delete it") from e
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            os.close(fd)
            raise UserError(f"{self.workdir}: another process is training here; wait for it, or choose another --workdir") from e
        except OSError:
            os.close(fd)  # a file system without locks
        else:
            LOCKS[path] = fd

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def log(self, step: int, scalars: Mapping[str, Any], kind: str = "train") -> None:
        """One line of metrics.jsonl, and the same to TensorBoard. A value that is not finite is null and counted in `nonfinite`.

        Raises UserError where the disk is full; the lines before are whole and this one is left out.
        """
        if not self.writer:
            return
        values = {name: number(value) for name, value in scalars.items()}
        line, lost = clean({"step": int(step), "kind": kind, **values})
        if lost:
            line["nonfinite"] = lost
        with writing(self.workdir):
            self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
            if self.use_tensorboard:
                if self.events is None:
                    self.events = tensorboard.Writer(self.workdir / "tensorboard", self.purge_step)
                self.events.scalars(int(step), {f"{kind}/{name}": float(value) for name, value in values.items()})

    def note(self, step: int, kind: str, fields: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl that holds more than numbers; TensorBoard is not told. Raises as `log`."""
        if self.writer:
            with writing(self.workdir):
                line = clean({"step": int(step), "kind": kind, **fields})[0]
                self._append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n")

    def resume_from(self, step: int) -> None:
        """Forgets every metric after `step`, and a last line cut short; -1 forgets all. Atomic: killed here, call it again."""
        if not self.writer:
            return
        self.close()
        path = self.workdir / "metrics.jsonl"
        with writing(self.workdir):
            if path.exists():
                kept = b"".join(raw + b"\n" for raw, line in lines(path) if line["step"] <= step)
                if kept != path.read_bytes():
                    replace(path, kept)
        self.purge_step = step + 1

    def write_json(self, name: str, value: Any) -> None:
        """Writes W/`name` in one piece. Numbers that are not finite become null; a dict then says how many in `nonfinite`."""
        if not self.writer:
            return
        value, lost = clean(value)
        if lost and isinstance(value, dict):
            value["nonfinite"] = lost
        with writing(self.workdir):
            replace(self.workdir / name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def write_lines(self, name: str, rows: list[Any]) -> None:
        """Writes W/`name` as JSON lines, in one piece."""
        if not self.writer:
            return
        text = "".join(json.dumps(clean(row)[0], ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with writing(self.workdir):
            replace(self.workdir / name, text.encode(errors="replace"))

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None where there is no such file. Raises UserError where it is not JSON."""
        return read_json(self.workdir / name)

    def read_metrics(self) -> list[dict[str, Any]]:
        """What was logged, here and before."""
        self.flush()
        return read_metrics(self.workdir / "metrics.jsonl")

    def flush(self) -> None:
        """What was logged is where others find it."""
        with writing(self.workdir):
            for file in (self.metrics, self.events):
                if file is not None:
                    file.flush()

    def close(self) -> None:
        """Closes what is open; a later `log` opens it again."""
        with writing(self.workdir):
            for file in (self.metrics, self.events):
                if file is not None:
                    file.close()
        self.metrics = self.events = None

    def _append(self, data: bytes) -> None:
        if self.metrics is None:
            self.metrics = files.growing(self.workdir / "metrics.jsonl")
        self.metrics.add(data)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one cut short; [] where there is no file. Raises UserError."""
    return [line for _, line in lines(path)] if path.exists() else []


def read_json(path: Path) -> Any:
    """The file's value, or None where there is no file. Raises UserError where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}); delete it or mend it") from e


def lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line's bytes and value. No prefix of a JSON object is one, so a line that was cut short cannot pass for whole."""
    raws = path.read_bytes().split(b"\n")
    for i, raw in enumerate(raws, 1):
        try:
            yield raw, json.loads(raw)
        except ValueError as e:
            if i == len(raws):
                return
            raise UserError(f"{path}:{i}: not a line of JSON ({e}); delete the line") from e


def clean(value: Any) -> tuple[Any, int]:
    """`value` in JSON's own types, with null for every float that is not finite, and how many there were."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        pairs = {str(key): clean(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, sum(lost for _, lost in pairs.values())
    if isinstance(value, (list, tuple)):
        items = [clean(item) for item in value]
        return [item for item, _ in items], sum(lost for _, lost in items)
    if isinstance(value, os.PathLike):
        return str(value), 0
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    return value, 0


def number(value: Any) -> int | float:
    """A Python number of any scalar; waits for a jax array."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
