"""SIGTERM and Ctrl-C ask a run to stop after its step; a second Ctrl-C stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """Training was asked to stop and has saved; running the same command again goes on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class Asked:
    """False until a signal came, then its number."""

    signum: int = 0

    def __bool__(self) -> bool:
        return bool(self.signum)


@contextmanager
def stop_signals() -> Iterator[Asked]:
    """Yields what becomes true when a signal has come. In another thread than the main one no signal is caught."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(signum: int, _: FrameType | None) -> None:
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signum = signum

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
