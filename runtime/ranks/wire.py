"""Messages between a group's owner and its ranks as bytes: JSON, and the bytes of arrays behind it.

Never pickled: what arrives makes plain values, arrays and the records of this list, and runs nothing. A tuple comes
back as one; a number of numpy as one of Python.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from runtime.ranks.program import Communicate, EngineProgram, PassedValue, RankGrid, RankProgram, RunGraph, Transfer
from runtime.rows import CacheShape
from runtime.step import Batch, Copy, Row

_RECORDS = (
    Batch, CacheShape, Communicate, Copy, EngineProgram, PassedValue, RankGrid, RankProgram, Row, RunGraph, Transfer,
)  # fmt: skip
_NAMED = {record.__name__: record for record in _RECORDS}
_HEAD = struct.Struct("!Q")  # bytes of the JSON
_ALIGNED = 16  # where arrays begin
_PLAIN = (type(None), bool, int, float, str)


class NoMessage(Exception):
    """Bytes that are none of ours."""


def encode(message: object) -> bytes:
    """Raises TypeError for a value that has no form here."""
    blobs: list[bytes] = []
    head = json.dumps(_plain(message, blobs)).encode()
    head += b" " * (-(_HEAD.size + len(head)) % _ALIGNED)
    return b"".join([_HEAD.pack(len(head)), head, *blobs])


def decode(data: bytes | bytearray) -> Any:
    """Arrays are views of `data`: they can be written to where it can. Raises NoMessage."""
    try:
        [size] = _HEAD.unpack_from(data)
        end = _HEAD.size + size
        return _Reader(memoryview(data), end).value(json.loads(data[_HEAD.size : end]))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, struct.error) as error:
        raise NoMessage(f"{type(error).__name__}: {error}") from error


def _plain(value: Any, blobs: list[bytes]) -> Any:
    """As JSON: what is no plain value is a list that begins with its kind."""
    if isinstance(value, np.generic):
        return _plain(value.item(), blobs)
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, list(value.shape), _put(blobs, value.tobytes())]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", _put(blobs, bytes(value))]
    if isinstance(value, Path):
        return ["path", str(value)]
    if type(value) in _RECORDS:
        given = value if isinstance(value, tuple) else [getattr(value, field.name) for field in fields(value)]
        return ["record", type(value).__name__, *(_plain(item, blobs) for item in given)]
    if isinstance(value, dict):
        return ["dict", *([_plain(key, blobs), _plain(item, blobs)] for key, item in value.items())]
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_plain(item, blobs) for item in value)]
    if type(value) in _PLAIN:
        return value
    raise TypeError(f"a {type(value).__name__} cannot be sent to a rank")


def _put(blobs: list[bytes], blob: bytes) -> int:
    blobs += [blob, bytes(-len(blob) % _ALIGNED)]
    return len(blob)


class _Reader:
    """Values in the order in which they were written: blobs follow one another."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at

    def value(self, found: Any) -> Any:
        if not isinstance(found, list):
            return found
        kind, *rest = found
        if kind == "array":
            dtype = np.dtype(rest[0])
            if dtype.hasobject:
                raise ValueError("an array of objects")
            return np.frombuffer(self._blob(rest[2]), dtype).reshape(rest[1])
        if kind == "bytes":
            return bytes(self._blob(rest[0]))
        if kind == "path":
            return Path(rest[0])
        if kind == "record":
            return _NAMED[rest[0]](*map(self.value, rest[1:]))
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in rest}
        if kind in ("list", "tuple"):
            return [self.value(item) for item in rest] if kind == "list" else tuple(map(self.value, rest))
        raise ValueError(f"a value of kind {kind!r}")

    def _blob(self, size: int) -> memoryview:
        begin, end = self._at, self._at + size
        if size < 0 or end > len(self._data):
            raise ValueError("it ends too soon")
        self._at = end + -size % _ALIGNED
        return self._data[begin:end]
