"""TensorBoard event files without TensorFlow or TensorBoard: TFRecord frames around tiny protobufs.

Formats: tensorflow/core/util/event.proto, summary.proto, lib/io/record_writer.h (the masked
CRC-32C of RFC 3720).
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_START = 1  # SessionLog.SessionStatus.START


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`; crc32c(b"123456789") is 0xE3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """One TFRecord frame: length, its masked checksum, the data, its masked checksum."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(step: int, body: bytes, wall_time: float | None = None) -> bytes:
    now = time.time() if wall_time is None else wall_time
    return record(b"\x09" + struct.pack("<d", now) + b"\x10" + _varint(step) + body)


def header() -> bytes:
    """The event that opens a file."""
    return _event(0, _field(3, b"brain.Event:2"))


def restart(step: int) -> bytes:
    """An event that makes TensorBoard forget everything at `step` and later from earlier files."""
    return _event(step, _field(7, b"\x08" + _varint(_START)))


def scalars(step: int, values: Mapping[str, float], wall_time: float | None = None) -> bytes:
    """One event with all scalars of a step; non-finite values are kept as such."""
    summary = b""
    for tag, value in values.items():
        value = min(max(value, -3.4e38), 3.4e38) if abs(value) < float("inf") else value
        inner = _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
        summary += _field(1, inner)
    return _event(step, _field(5, summary), wall_time)


def file_name(number: int) -> str:
    """A name TensorBoard recognises and reads in order."""
    return f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{number}"
