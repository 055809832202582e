"""The bundle, sources alone: what is carried runs where it is unpacked, and a damaged part is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders.errors import InputError
from measure.gpu_proof import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "gpu-bundle"
    bundle.make_bundle(out, "3.12", wheels=())
    return out


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "run.sh"), *arguments]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # its python3 has numpy
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd="/", env={**os.environ, **path}
    )


def test_the_sums_vouch_for_every_part(folder: Path) -> None:
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {file.name for file in folder.iterdir()} == {*(n for _, n in sums), "manifest.json", "SHA256SUMS", "run.sh"}
    for digest, name in sums:
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert len(content) < 60 << 20
    assert json.loads((folder / "manifest.json").read_text()) == {"python": "3.12", "wheels": [], "missing": {}}
    assert bundle.sources() == bundle.sources()


def test_what_is_unpacked_runs_from_its_own_folder(folder: Path, tmp_path: Path) -> None:
    done = _run(folder, str(tmp_path / "target"), "--help")
    assert done.returncode == 0, done.stderr
    assert "--budget-s" in done.stdout
    assert "not all parts are here" in done.stderr
    unpacked = tmp_path / "target" / "source"
    for name in ("measure/gpu_proof/__main__.py", "runtime/generation/engine.py", "tests/gpu/conftest.py",
                 "model_repository/adapters/generator/1/model.py", "pyproject.toml"):  # fmt: skip
        assert (unpacked / name).read_bytes() == (bundle.ROOT / name).read_bytes()


def test_a_damaged_part_is_refused(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    damaged.mkdir()
    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "sources.tar.gz.part00":
            content[1000] ^= 1
        (damaged / file.name).write_bytes(content)
    done = _run(damaged, str(tmp_path / "target"), "--help")
    assert done.returncode != 0
    assert "sources.tar.gz.part00: FAILED" in done.stdout
    assert not (tmp_path / "target" / "source").exists()


def test_a_folder_must_be_named(folder: Path) -> None:
    done = _run(folder)
    assert done.returncode == 2
    assert "expected: bash run.sh FOLDER" in done.stderr


def test_large_archives_are_parted_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PART_BYTES", 100_000)
    bundle.make_bundle(tmp_path / "bundle", "3.12", wheels=())
    parts = list((tmp_path / "bundle").glob("*.part*"))
    assert len(parts) > 3
    assert all(part.stat().st_size <= 100_000 for part in parts)
    done = _run(tmp_path / "bundle", str(tmp_path / "target"), "--help")
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match="there already"):
        bundle.make_bundle(tmp_path / "bundle", "3.12", wheels=())


def test_a_wheel_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the sources are made all the same."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert set(bundle.make_bundle(tmp_path / "bundle", "3.12", wheels=("pydantic",))) == {"pydantic"}
    assert [part.name for part in (tmp_path / "bundle").glob("*.part*")] == ["sources.tar.gz.part00"]
