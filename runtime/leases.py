"""Who made a folder of work, and whether they still live: also where hosts or containers share the disk.

The name of such a folder holds this host's boot and its namespace of process ids beside the process id, which alone
means something else elsewhere. Needs no package.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

BEAT_S = 60.0
ABANDONED_S = 3600.0  # without a beat, for work of another host or container


def owner() -> str:
    """`<place>.<process id>`, without a dash. The place is a boot of a host and a namespace of process ids."""
    return f"{_place()}.{os.getpid()}"


def abandoned(folder: Path, owner_name: str, now: float | None = None) -> bool:
    """Whether the owner is dead: certain for a process of this place; elsewhere, when its `beating` stopped long ago.

    `now` is the time by the clock of the folder's disk, None where nobody beats: then work from elsewhere stays.
    """
    place, _, process = owner_name.rpartition(".")
    if place == _place():
        return process.isdigit() and not _lives(process)
    try:
        return now is not None and now - folder.stat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False  # somebody else was faster


@contextlib.contextmanager
def beating(folder: Path, every_s: float = BEAT_S) -> Iterator[None]:
    """Keeps the folder's time of change young while the work in it goes on."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(folder)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _place() -> str:
    host, processes = platform.node(), ""
    with contextlib.suppress(OSError):  # sandboxes may hide either; a container's host name is its own too
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{host} {processes}".encode()).hexdigest()[:12]


def _lives(process: str) -> bool:
    """A zombie does not: its parent has only not asked yet."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
