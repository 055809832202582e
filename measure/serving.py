"""`trireme serve` as a process of its own, on free ports, from its first word to the end of its drain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from builders.errors import MachineError
from builders.spec import DeploymentSpec, load_spec

PORTS = ("http", "grpc", "metrics", "gateway", "gateway-grpc")
_END_S = 120.0  # to drain


@dataclass(frozen=True)
class ServeProcess:
    """`facts`: what `trireme serve --json` says of itself."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]

    def end(self) -> int:
        """Its exit code, after it has drained."""
        self.process.terminate()
        try:
            code = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def start_serving(
    spec: Path,
    build_dir: Path,
    *options: str,
    ports: Sequence[str] = PORTS,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    words: IO[str] | None = None,
) -> ServeProcess:
    """`before`: a command that runs it; `words`: where its standard error goes, by default to ours. Raises MachineError
    where it does not start."""
    command = [sys.executable, "-m", "builders", "serve", str(spec), "--json", "--build-dir", str(build_dir)]
    command += [*(f"--{name}-port=0" for name in ports), *options]
    process = subprocess.Popen(
        [*before, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, text=True, env=environment
    )
    started = ServeProcess(process, {})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            log = "what it said above" if words is None else words.name
            raise MachineError(f"trireme serve {spec}", got="it ended", expected="a server", fix=f"see {log}")
        started.facts.update(json.loads(line))
    except BaseException:
        started.end()
        raise
    return started


def minilm_in_fp32() -> DeploymentSpec:
    """Which every CPU serves, and which is not searched for."""
    spec = load_spec("minilm")
    return spec.model_copy(update={"precision": spec.precision.model_copy(update={"cpu": "fp32"})})


def write_spec(spec: DeploymentSpec, file: Path) -> Path:
    import yaml

    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return file
