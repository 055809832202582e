"""Results are whole or absent, and found again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from builders.artifacts import FileRecord, Quality, ServedQuality
from builders.errors import MachineError
from builders.store import Store, atomic_directory, tool_versions

QUALITY = Quality(mean_cosine=1, worst_cosine=1, max_abs_difference=0, texts=1, executor="none")


def _make(out: Path) -> ServedQuality:
    (out / "weights").write_bytes(b"12345")
    return ServedQuality(directory=out, files=(FileRecord.of(out / "weights"),), quality=QUALITY)


def test_the_second_time_nothing_is_built(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, hit = store.get_or_build("stage", {"a": 1}, ServedQuality, _make)
    again, second_hit = store.get_or_build("stage", {"a": 1}, ServedQuality, lambda out: pytest.fail("built again"))
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


def test_an_absent_tool_is_part_of_the_key() -> None:
    assert tool_versions("no-such-distribution") == {"no-such-distribution": "absent"}
