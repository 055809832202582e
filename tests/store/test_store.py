"""Results are whole or absent, and found again."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.artifacts import FileRecord, Quality, ServedQuality, file_digest
from builders.errors import MachineError
from builders.store.atomic import atomic_directory
from builders.store.store import Store
from runtime import leases
from tests.conftest import wait_until

QUALITY = Quality(mean_cosine=1, worst_cosine=1, max_abs_difference=0, texts=1, executor="none")


def _make(out: Path) -> ServedQuality:
    (out / "weights").write_bytes(b"12345")
    return ServedQuality(directory=out, files=(FileRecord.of(out / "weights"),), quality=QUALITY)


def test_the_second_time_nothing_is_built(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, hit = store.get_or_build("stage", {"a": 1}, ServedQuality, _make)
    again, second_hit = store.get_or_build("stage", {"a": 1}, ServedQuality, _make)
    other, other_hit = store.get_or_build("stage", {"a": 2}, ServedQuality, _make)
    assert (hit, second_hit, other_hit) == (False, True, False)
    assert first == again
    assert first.digest == other.digest
    assert other.directory != first.directory


@pytest.mark.parametrize("damage", [b"1234", b"12346"])
def test_a_damaged_result_is_built_again(tmp_path: Path, damage: bytes) -> None:
    store = Store(tmp_path)
    first, _ = store.get_or_build("stage", {}, ServedQuality, _make)
    first.path("weights").write_bytes(damage)
    again, hit = store.get_or_build("stage", {}, ServedQuality, _make)
    assert not hit
    assert again.path("weights").read_bytes() == b"12345"


def test_another_stage_never_meets_the_result(tmp_path: Path) -> None:
    def make(out: Path) -> ServedQuality:
        return _make(out)

    store = Store(tmp_path)
    store.get_or_build("stage", {}, ServedQuality, _make)
    assert not store.get_or_build("stage", {}, ServedQuality, make)[1]


@pytest.mark.parametrize("value", [{"b", "a"}, object()])
def test_a_key_that_differs_by_process_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="JSON"):
        Store(tmp_path).get_or_build("stage", {"a": value}, ServedQuality, _make)


def test_a_file_that_stayed_the_same_is_read_once(tmp_path: Path) -> None:
    """By what the process has read, as the kernel counts it."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 << 20))
    os.utime(file, (1, 1))  # long ago: no later change can keep the time
    first, read = _read_by(lambda: file_digest(file))
    file.rename(tmp_path / "renamed")
    (tmp_path / "linked").hardlink_to(tmp_path / "renamed")
    again, read_again = _read_by(lambda: file_digest(tmp_path / "linked"))
    assert first == again
    assert read >= 8 << 20
    assert read_again < 1 << 20


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for content in (b"12345", b"12346", b"12345"):
        file.write_bytes(content)
        assert file_digest(file) == hashlib.sha256(content).hexdigest()


def _read_by(action: Callable[[], str]) -> tuple[str, int]:
    def count() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])

    before = count()
    return action(), count() - before


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill(out: Path) -> ServedQuality:
        (out / "half").write_bytes(b"1")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineError, match="no space left"):
        Store(tmp_path).get_or_build("stage", {}, ServedQuality, fill)
    assert list((tmp_path / "stage").iterdir()) == []


def test_work_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with atomic_directory(tmp_path / "never") as work:
            (work / "half").write_bytes(b"1")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert [path.name for path in tmp_path.glob(".tmp-*")]
    with atomic_directory(tmp_path / "whole") as work:
        (work / "file").write_bytes(b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def _elsewhere(folder: Path, age_s: float) -> Path:
    """Work that another host or container does in `folder`, whose process id means nothing here."""
    work = folder / ".tmp-0123456789ab.4194304-x"
    work.mkdir(parents=True)
    (work / "half").write_bytes(b"1")
    os.utime(work, (time.time() - age_s,) * 2)
    return work


def test_work_that_goes_on_elsewhere_stays(tmp_path: Path) -> None:
    work = _elsewhere(tmp_path, age_s=2 * leases.BEAT_S)
    with atomic_directory(tmp_path / "whole"):
        pass
    assert (work / "half").is_file()


def test_work_that_was_left_elsewhere_goes(tmp_path: Path) -> None:
    work = _elsewhere(tmp_path, age_s=2 * leases.ABANDONED_S)
    with atomic_directory(tmp_path / "whole"):
        pass
    assert not work.exists()


def test_work_in_another_namespace_of_processes_is_not_dead(tmp_path: Path) -> None:
    """A container's own process 7 is no process here, or another one."""
    place, _, process = leases.owner().rpartition(".")
    assert process == str(os.getpid())
    assert leases.abandoned(tmp_path, f"{place}.4194304")
    assert not leases.abandoned(tmp_path, "0123456789ab.4194304", time.time())
    assert not leases.abandoned(tmp_path, "0123456789ab.4194304")


def test_work_beats_while_it_goes_on(tmp_path: Path) -> None:
    os.utime(tmp_path, (1, 1))
    with leases.beating(tmp_path, every_s=0.01):
        assert wait_until(lambda: tmp_path.stat().st_mtime > 1, limit_s=30)
    threads = {thread.name for thread in threading.enumerate()}
    assert "lease" not in threads
