"""A file that is replaced whole or not at all, and stays so when the power goes; and a lock beside one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from runtime.errors import MachineError


def replace_file(path: Path, content: bytes) -> None:
    """A reader sees the old content or the new one. Raises OSError, and the old content stays."""
    partial = path.with_name(f".{path.name}.new")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def lock_beside(path: Path, what: str) -> TextIO:
    """A lock that keeps other processes out until it is closed, or its process ends. Raises MachineError when another
    has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise MachineError(
            f"{what} {path}",
            got="another process that carries it out",
            expected="one at a time",
            fix="wait for it, or end it",
        ) from None
    return lock
