"""What people use today to generate, in process, on all cores: tokens/s and time to the first token.

Each peer runs in a process of its own, so that no two thread pools fight, and ends by a time limit. Those that are
not installed, or fail, are left out with the reason. Models are converted by each peer's own tool, once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from builders.store.atomic import atomic_directory
from measure.bench.generation_peer_process import PEERS, Timing, Workload

_MODULES = {
    "transformers fp32": "transformers",
    "onnxruntime-genai int4": "onnxruntime_genai",
    "CTranslate2 int8": "ctranslate2",
    "OpenVINO GenAI int8": "openvino_genai",
    "OpenVINO GenAI int4": "openvino_genai",
}


@dataclass(frozen=True)
class GenerationPeer:
    """The timings of one peer, a batch size each, and its perplexity where text was given; or nothing, and why."""

    name: str
    timings: tuple[Timing, ...] = ()
    perplexity: float | None = None
    skipped: str | None = None


def run_all(
    model: Path,
    work: Path,
    workload: Workload,
    *,
    openvino_exporter: str | None = None,
    timeout_s: float = 600,
    report: Callable[[str], None] = lambda peer: None,
) -> list[GenerationPeer]:
    """Every peer over the Hugging Face folder `model`; conversions are kept in `work`, which is for that model alone.

    `openvino_exporter` is the path of `optimum-cli`, which wants an older transformers than this project and so an
    environment of its own. `timeout_s` bounds each program: OpenVINO's conversion, and every peer.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for name in PEERS:
        report(name)
        found.append(_run(name, model, work, workload, openvino_exporter or shutil.which("optimum-cli"), timeout_s))
    return found


def _run(
    name: str, model: Path, work: Path, workload: Workload, exporter: str | None, timeout_s: float
) -> GenerationPeer:
    if importlib.util.find_spec(_MODULES[name]) is None:
        return GenerationPeer(name, skipped=f"{_MODULES[name]} is not installed (make bench-install)")
    try:
        if name.startswith("OpenVINO"):
            _export_openvino(model, work, name.rsplit(" ", 1)[1], exporter, timeout_s)
        program = [sys.executable, "-m", "measure.bench.generation_peer_process"]
        arguments = [name, str(model), str(work), json.dumps(asdict(workload))]
        lines = [
            json.loads(line) for line in _output([*program, *arguments], timeout_s).splitlines() if line[:1] == "{"
        ]
    except _PeerFailed as failure:
        return GenerationPeer(name, skipped=str(failure))
    perplexity = next((line["perplexity"] for line in lines if "perplexity" in line), None)
    return GenerationPeer(name, tuple(Timing(**line) for line in lines if "perplexity" not in line), perplexity)


class _PeerFailed(Exception):
    """A peer's process ended badly; the message says how."""


def _export_openvino(model: Path, work: Path, precision: str, exporter: str | None, timeout_s: float) -> None:
    folder = work / f"openvino-{precision}"
    if folder.is_dir():
        return
    if exporter is None:
        raise _PeerFailed("optimum-cli is not installed (make bench-install)")
    with atomic_directory(folder) as part:
        command = [exporter, "export", "openvino", "-m", str(model), "--task", "text-generation-with-past"]
        _output([*command, "--weight-format", precision, str(part)], timeout_s)


def _output(command: list[str], timeout_s: float) -> str:
    """Standard output of a program that gets a session of its own, so that a time limit ends its children too."""
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = program.communicate(timeout=timeout_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _PeerFailed(f"not done after {timeout_s:.0f} s") from None
        raise
    if program.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
        raise _PeerFailed(f"exit {program.returncode}: {last.strip()[:200]}")
    return output
