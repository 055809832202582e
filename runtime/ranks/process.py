"""One rank's process: how it is started and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CPU_WORKER = "runtime.ranks.worker"
GPU_WORKER = "runtime.tensorrt.rank_worker"
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]


def start_rank(
    rank: int, ranks: int, meeting: str, interface: str, descriptor: int, log: Path, worker: str = CPU_WORKER
) -> subprocess.Popen[bytes]:
    """Commands come through `descriptor`; `meeting` is where the ranks find each other (`file://` or `tcp://`).

    `worker` is the module that runs. The kernel ends the process with the thread that called this.
    """
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(rank), str(ranks), meeting, str(descriptor), str(os.getpid())]
    with log.open("wb") as words:
        return subprocess.Popen(
            [sys.executable, "-m", worker, *arguments],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stderr=words,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])},
        )


def last_words(log: Path) -> str:
    """What a rank wrote last, at most 200 characters; empty where it wrote nothing."""
    return "".join(log.read_text(errors="replace").strip().splitlines()[-1:])[:200]


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Nothing that a rank holds is worth a farewell. One that the kernel cannot end (a driver hangs) is left behind."""
    for process in processes:
        process.kill()
    deadline = time.monotonic() + _END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"ranks: process {process.pid} does not end; it is left behind", file=sys.stderr, flush=True)
