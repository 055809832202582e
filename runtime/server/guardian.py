"""Tidies up after a Triton server, whatever its launcher died of.

    python -I -S guardian.py <shared memory prefix> <scratch folder> <grace seconds>

Standard input is a pipe that only the launcher holds. Through it come a line "+<process id>" for each server that is
started, before it starts, and "-<process id>" when nothing of it is left. The pipe's end means that the launcher is
gone, by `stop` or by `kill -9`: a server is asked to leave, its process group is ended, its shared memory and scratch
files are removed.
Only the standard library, and started with -I -S, so that it costs next to nothing.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import sys
import time


def main() -> None:
    prefix, work, grace_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # a Ctrl-C for the launcher is not for us
    for group in left(sys.stdin.read()):  # returns at the end of the pipe
        end_group(group, grace_s)
    sweep(prefix)
    shutil.rmtree(work, ignore_errors=True)


def left(said: str) -> set[int]:
    """Process groups that were started and not seen to end."""
    groups: set[int] = set()
    for line in said.splitlines():
        if line[:1] == "+":
            groups.add(int(line[1:]))
        elif line[:1] == "-":
            groups.discard(int(line[1:]))
    return groups


def end_group(group: int, grace_s: float) -> None:
    """SIGTERM, then SIGKILL for what is left. The group outlives its leader: stubs of a killed server are in it."""
    with contextlib.suppress(ProcessLookupError):
        if _alive(group):
            os.kill(group, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises once the last member is gone
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Running, and not a zombie that waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def sweep(prefix: str) -> None:
    for path in glob.glob(f"/dev/shm/{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main()
