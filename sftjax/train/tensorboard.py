"""Scalars in TensorBoard's own file format, written at once by the caller.

A file is a sequence of TFRecords (length, its checksum, bytes, their checksum); each holds one `Event` message of
tensorflow/core/util/event.proto, of which a scalar needs five fields. They are encoded here because the client libraries
import torch where there is one (six seconds), and write from a thread whose death on a full disk blocks the run for ever.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from sftjax.train.files import growing


class Writer:
    """A new event file in `directory`. `purge_step`: TensorBoard forgets what older files say of this step and later."""

    def __init__(self, directory: Path, purge_step: int | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        number = len(list(directory.glob("events.out.tfevents.*")))  # readers sort by name: two files of one second stay in order
        name = f"events.out.tfevents.{int(time.time()):010d}.{number:04d}.{socket.gethostname()}"
        self.file = growing(directory / name)
        self._write(_text(3, "brain.Event:2"))
        if purge_step is not None:
            self._write(_int(2, purge_step) + _message(7, _int(1, 1)))  # session_log.status = START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(_message(1, _text(1, name) + _float(2, value)) for name, value in values.items())
        self._write(_int(2, step) + _message(5, summary))

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields  # wall_time
        self.file.add(record(event))


def record(data: bytes) -> bytes:
    """`data` framed as one TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ 0x82F63B78 if n & 1 else n >> 1  # the Castagnoli polynomial, bits reversed
        table.append(n)
    return table


CRC = _crc_table()


# Protocol buffers: a field is a varint of number << 3 | wire type, then its value.


def _varint(n: int) -> bytes:
    n &= 2**64 - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
