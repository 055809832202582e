"""The Flower app in Flower's own environment (`make flower`): a real SuperLink and two SuperNodes on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from builders.judging.corpus import Document
from builders.spec import load_spec
from online.loop.journal import LoopFiles
from online.loop.lessons import OFFER, WEIGHTS, learn_lesson, read_offer
from online.loop.records import UpdateStage
from runtime.ports import free_ports
from tests import ROOT
from tests.conftest import wait_until
from tests.online.loop_world import save_first
from tests.online.small import WINDOW, save_small
from tests.online.test_federated_learning import SPEC, begun, texts_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FLOWER_BIN" not in os.environ, reason="Flower's environment: `make flower` makes it"),
]
PATIENCE_S = 400


def _trireme(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "builders", "online", "federate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=ROOT)


@contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("w") as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, env=environment)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def test_a_fleet_trains_what_the_gate_takes(tmp_path: Path) -> None:
    model = save_small(tmp_path / "model")
    (model / "tokenizer.json").write_bytes((save_first(tmp_path / "words") / "tokenizer.json").read_bytes())
    online = {"learner": {"window": WINDOW, "rows": 8, "steps": 40, "learning_rate": 0.001},
              "gate": {"max_forgetting": 1.0}, "federated": SPEC["federated"]}  # fmt: skip
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({
        "name": "tiny", "model": {"source": str(model), "task": "generation", "max_length": WINDOW},
        "precision": {"cpu": "fp32"}, "online": online,
    }))  # fmt: skip
    begun(spec, tmp_path / "coordinator")
    held_out = texts_file(tmp_path / "held-out.txt", 2, 200, 30)
    offered = _trireme(
        "offer", spec, "--out", tmp_path / "offer", "--held-out", held_out, "--build-dir", tmp_path / "coordinator"
    )
    assert offered.returncode == 0, offered.stderr
    out = tmp_path / "joined.safetensors"
    _flower_rounds(tmp_path, spec, out)
    before, after = load_file(tmp_path / "offer" / WEIGHTS), load_file(out)
    assert before.keys() == after.keys()
    mean = _by_hand(tmp_path, spec)
    apart, moved = (
        np.sqrt(sum(np.square(after[name] - other[name]).sum() for name in after)) for other in (mean, before)
    )
    assert apart < 0.02 * moved, "Flower's rounds are the mean of the clients' lessons"
    taken = _trireme("take", spec, "--weights", out, "--build-dir", tmp_path / "coordinator")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    state = LoopFiles(tmp_path / "coordinator", "tiny").load()
    assert state is not None
    assert state.update is not None
    assert state.update.stage is UpdateStage.PASSED


def _apart(one: dict[str, NDArray[np.float32]], other: dict[str, NDArray[np.float32]]) -> float:
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


def _by_hand(tmp_path: Path, spec: Path) -> dict[str, NDArray[np.float32]]:
    """The same rounds in this process, without Flower."""
    loaded, offer = load_spec(str(spec)), read_offer(tmp_path / "offer" / OFFER)
    weights = tmp_path / "offer" / WEIGHTS
    found: dict[str, NDArray[np.float32]] = {}
    for number in range(offer.plan.rounds):
        after = []
        for client in range(2):
            lines = (tmp_path / f"client-{client}.txt").read_text().splitlines()
            documents = [Document(line, (line,)) for line in lines]
            files, out = LoopFiles(tmp_path / f"by-hand-{client}", "tiny"), tmp_path / "by-hand-out"
            learn_lesson(loaded, files, documents, offer, number, weights, out)
            after.append(load_file(out))
        found = {name: (after[0][name] + after[1][name]) / 2 for name in after[0]}
        weights = tmp_path / "by-hand"
        save_file(found, weights)
    return found


def _flower_rounds(tmp_path: Path, spec: Path, out: Path) -> None:
    """`out` is there when it returns."""
    flower, home = Path(os.environ["FLOWER_BIN"]), tmp_path / "flwr"
    link, *nodes = free_ports(3)
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": f"{flower}:{os.environ['PATH']}"}
    trireme = tmp_path / "trireme"
    trireme.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m builders "$@"\n')
    trireme.chmod(0o755)
    app = tmp_path / "app"
    shutil.copytree(ROOT / "online" / "flower", app, ignore=shutil.ignore_patterns("__pycache__"))
    superlink = [str(flower / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(link)]
    with _running(superlink, tmp_path / "superlink.log", environment):
        told = []
        for number, port in enumerate(nodes):
            texts = texts_file(tmp_path / f"client-{number}.txt", 2, 200, 50 + number)
            own = {"trireme": trireme, "spec": spec, "build-dir": tmp_path / f"client-{number}", "texts": texts}
            told.append([
                str(flower / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{link}",
                "--host", "127.0.0.1", "--port", str(port),
                "--node-config", " ".join(f'{name}="{value}"' for name, value in own.items()),
            ])  # fmt: skip
        one, other = (tmp_path / f"node-{number}.log" for number in range(2))
        with _running(told[0], one, environment), _running(told[1], other, environment):
            config = f'offer="{tmp_path / "offer"}" out="{out}" clients=2 timeout-s=300.0'
            command = [str(flower / "flwr"), "run", str(app), "here", "--run-config", config]
            end = time.monotonic() + 60
            while True:  # until the SuperLink listens
                asked = subprocess.run(
                    command, capture_output=True, text=True, timeout=120, env=environment, check=False
                )
                if not asked.returncode or time.monotonic() > end:
                    break
                time.sleep(1)
            assert not asked.returncode, asked.stdout + asked.stderr
            assert wait_until(out.is_file, PATIENCE_S), _logs(tmp_path)


def _logs(folder: Path) -> str:
    return "\n".join(f"{file.name}\n{file.read_text()[-3000:]}" for file in sorted(folder.glob("*.log")))
