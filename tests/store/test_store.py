"""Results are whole or absent, and found again."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from builders.artifacts import FileRecord, Quality, ServedQuality, file_digest
from builders.errors import MachineError
from builders.store.atomic import atomic_directory
from builders.store.store import Store
from builders.training.resume import Resume
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


_VALUES = np.ones(1 << 18, np.float32)  # 1 MiB


def _graph_of_values() -> onnx.ModelProto:
    tensor = onnx.numpy_helper.from_array(_VALUES, "w")
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))


_WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda file: file.write_bytes(_VALUES.tobytes()),
    "numpy": lambda file: np.save(file, _VALUES),
    "onnx": lambda file: onnx.save(_graph_of_values(), file),
    "safetensors": lambda file: save_file({"w": torch.from_numpy(_VALUES)}, file),
    "training state": lambda file: Resume(file, "key").save({"w": torch.from_numpy(_VALUES)}),
}


@contextmanager
def _files_at_most(limit_bytes: int) -> Iterator[None]:
    """Stands for a full disk: what this process writes beyond it fails in the very same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", _WRITERS)
def test_a_full_disk_is_told_by_every_writer_and_leaves_nothing_behind(tmp_path: Path, writer: str) -> None:
    def fill(out: Path) -> ServedQuality:
        _WRITERS[writer](out / "half")
        raise AssertionError("all was written")

    with pytest.raises(MachineError, match="no space left"), _files_at_most(1 << 16):
        Store(tmp_path).get_or_build("stage", {}, ServedQuality, fill)
    assert list((tmp_path / "stage").iterdir()) == []


def test_a_training_whose_state_finds_no_room_keeps_the_one_before(tmp_path: Path) -> None:
    resume = Resume(tmp_path / "state", "key")
    resume.save({"step": 1})
    with pytest.raises(MachineError, match="no space left"), _files_at_most(1 << 16):
        resume.save({"step": 2, "w": torch.from_numpy(_VALUES)})
    assert resume.load() == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


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
