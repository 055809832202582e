"""SHA-256 of files. A process reads a file once, as long as that does not change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

_CHUNK = 1 << 20
_SETTLED_NS = 50_000_000  # clocks of file systems tick every 10 ms: a younger file may change and keep its time
_known: dict[tuple[int, ...], str] = {}  # by device, inode, size and time of change, which renames and links keep


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in chunks of 1 MiB."""
    with path.open("rb") as stream:
        before = _identity(stream.fileno())
        if before in _known:
            return _known[before]
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        if before == _identity(stream.fileno()) and time.time_ns() - before[-1] > _SETTLED_NS:
            _known[before] = digest.hexdigest()
    return digest.hexdigest()


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
