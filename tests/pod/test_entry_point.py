"""The pod's command before it serves: NVIDIA's image, a home that is not there, agents of ranks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import BadEnvironment
from runtime.server.installation import Installation
from runtime.server.launch import Ports
from runtime.settings import ServerSettings
from tests.conftest import wait_until
from tests.pod.test_pod import _command, _ready


def test_the_images_triton_is_found_by_its_folder(tmp_path: Path) -> None:
    """NVIDIA's image keeps everything under one folder; the wheel of this environment comes first."""
    system = tmp_path / "tritonserver"
    (system / "bin").mkdir(parents=True)
    shutil.copy(sys.executable, system / "bin" / "tritonserver")
    with pytest.raises(BadEnvironment, match="no Python backend"):
        Installation._of_the_system(system)
    (system / "backends" / "python").mkdir(parents=True)
    (system / "backends" / "python" / "triton_python_backend_stub").touch()
    found = Installation._of_the_system(system)
    assert found.backends == system / "backends"
    assert found.stub is None
    assert Installation.find(system).stub is not None


def test_the_entry_point_starts_without_a_home() -> None:
    done = subprocess.run(
        _command("--help"), capture_output=True, text=True, timeout=60, check=True, env={"HOME": "/nonexistent"}
    )
    assert "fetch" in done.stdout


def _agent(folder: Path, *more: object) -> list[str]:
    ServerSettings(
        ensemble="tiny", models=("tiny",), version=1, response_cache_bytes=0, rate_limited=False, content_digest="c"
    ).save(folder)
    where = ("--leader", "127.0.0.1", "--host", 1, "--hosts", 2, "--ranks-each", 1)
    return _command(
        "ranks",
        folder,
        "--platform",
        "cpu",
        *where,
        "--hosts-secret-file",
        folder / "secret",
        "--interface",
        "lo",
        *more,
    )


def test_an_agent_of_ranks_wants_the_hosts_secret(tmp_path: Path) -> None:
    done = subprocess.run(_agent(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "hosts prove a shared secret" in done.stderr


def test_an_agent_of_ranks_waits_for_its_leader_and_leaves_when_asked(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef")
    health, nobody = (Ports.free().http for _ in range(2))
    process = subprocess.Popen(_agent(tmp_path, "--hosts-port", nobody, "--health-port", health))
    try:
        assert wait_until(lambda: _ready(health), 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)
