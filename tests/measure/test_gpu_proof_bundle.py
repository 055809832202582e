"""The bundle, sources alone: what is carried runs where it is unpacked, and a damaged file is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


def _bash(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its python3 has numpy
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, timeout=60, check=False, cwd="/",
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


def _bundle(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    nothing = {"WHEELS": "", "SOURCES": ""}
    return _bash(ROOT / "measure" / "gpu_proof" / "bundle.sh", *arguments, **(nothing | environment))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "gpu-bundle"
    done = _bundle(str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_what_is_unpacked_runs_from_its_own_folder(folder: Path, tmp_path: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"sources.tar.gz", "wheels", "SHA256SUMS", "run.sh"}
    done = _bash(folder / "run.sh", str(tmp_path / "target"), "--help")
    assert done.returncode == 0, done.stderr
    assert "--budget-s" in done.stdout
    unpacked = tmp_path / "target" / "source"
    for name in ("measure/gpu_proof/__main__.py", "runtime/generation/engine.py", "tests/gpu/conftest.py",
                 "model_repository/adapters/generator/1/model.py", "pyproject.toml"):  # fmt: skip
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(unpacked.rglob("__pycache__"))


@pytest.mark.parametrize("name", ["sources.tar.gz", "wheels/some-1-py3-none-any.whl"])
def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    carried = tmp_path / "bundle"
    shutil.copytree(folder, carried)
    with (carried / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  wheels/some-1-py3-none-any.whl\n")  # one that may be left behind
    (carried / name).write_bytes(b"damaged")
    done = _bash(carried / "run.sh", str(tmp_path / "target"), "--help")
    assert done.returncode != 0
    assert f"{name}: FAILED" in done.stdout
    assert not (tmp_path / "target" / "source").exists()


def test_folders_must_be_named_and_a_bundle_must_be_new(folder: Path) -> None:
    for done, said in (
        (_bash(folder / "run.sh"), "expected: bash run.sh FOLDER"),
        (_bundle(), "expected: bash bundle.sh FOLDER"),
        (_bundle(str(folder)), "is there already; expected a new folder"),
    ):
        assert done.returncode == 2
        assert said in done.stderr


def test_a_wheel_that_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    """Without a network the sources are made all the same, and nothing half-written stays."""
    done = _bundle(str(tmp_path / "bundle"), WHEELS="pydantic", SOURCES="tensorrt_rtx", PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "missing" in line] == [
        "missing: pydantic", "missing: tensorrt_rtx",
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "sources.tar.gz").is_file()
