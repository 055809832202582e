"""Directories that appear whole or not at all. Needs no package: the GPU proof writes on machines that have few."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from builders.errors import MachineError
from runtime.leases import abandoned, beating, owner

_PREFIX = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Where the number is lost: safetensors tells it in words, numpy that less was written than it asked for.
_FULL_IN_WORDS = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|\d+ requested and \d+ written")


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory to write in, renamed to `target` on success and removed on any failure.

    If `target` has appeared meanwhile, the new one is dropped. Raises MachineError when the disk is full.
    """
    with telling_disk_full(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{owner()}-", dir=target.parent))
        try:
            _sweep_dead(target.parent, work.stat().st_mtime)
            with beating(work):
                yield work
            work.chmod(0o755)  # mkdtemp makes 0700, and a server may run as another user
            with contextlib.suppress(OSError):
                work.rename(target)
            if not target.is_dir():
                raise OSError(errno.EIO, f"cannot rename {work.name} to {target.name}")
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def telling_disk_full(folder: Path) -> Iterator[None]:
    """Raises MachineError for what says so, in whatever words the library that wrote has for it."""
    try:
        yield
    except Exception as error:
        if not _says_full(error):
            raise
        free_mb = shutil.disk_usage(folder).free >> 20
        raise MachineError(
            f"writing to {folder}",
            got=f"no space left ({free_mb} MiB free)",
            expected="room for the result",
            fix="free space or choose another --build-dir; nothing half-written was left behind",
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """It, or what it came from: torch closes its archive after a write that failed, and that is what it then raises."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if _FULL_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sweep_dead(parent: Path, now: float) -> None:
    """Removes work directories whose process was killed before it could tidy up; `now` by the clock of the disk."""
    for leftover in parent.glob(f"{_PREFIX}*-*"):
        if abandoned(leftover, leftover.name.removeprefix(_PREFIX).split("-")[0], now):
            shutil.rmtree(leftover, ignore_errors=True)
