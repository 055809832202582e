"""perf_analyzer, the load generator in the wheel of Triton's own client: it measures through the gateway too.

Its binary wants CUDA's runtime, which PyPI has, and Debian's libb64, which `make clients` unpacks beside it.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure.clients.asking import Asks, ServedPair, require, same

CLIENT = "tritonclient"  # whose wheel it is in
_SECONDS = 60
_REQUESTS = 20  # of a window, at least
# Three windows, however far apart they lie: what is looked at here is whether it measures, on machines that are busy.
_WINDOWS = [
    "--measurement-mode",
    "count_windows",
    "--measurement-request-count",
    str(_REQUESTS),
    "-r",
    "3",
    "-s",
    "10000",
]


def asks(served: ServedPair) -> Asks:
    text, expected, count = served.greedy[0]

    def embeddings(protocol: str, address: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.csv"
            _measure(served, "minilm", protocol, address, "--string-data", text, "-f", str(file))
            figures = next(csv.DictReader(file.read_text().splitlines()))
            require(float(figures["Inferences/Second"]) > 0 and int(figures["p50 latency"]) > 0, figures)

    def stream() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data, profile = Path(folder) / "data.json", Path(folder) / "profile.json"
            data.write_text(json.dumps({"data": [{"text_input": [text], "max_tokens": [count], "stream": [True]}]}))
            options = ["--streaming", "--input-data", str(data), "--profile-export-file", str(profile)]
            _measure(served, "talker", "grpc", served.text_grpc, *options)
            found = json.loads(profile.read_text())["experiments"][0]["requests"]
        require(len(found) >= _REQUESTS, found)
        for one in found:
            same("".join(piece["text_output"] for piece in one["response_outputs"]), expected)
            require(one["response_outputs"][-1]["finish_reason"], one)

    def without_key() -> None:
        program = _program("minilm", "http", served.vectors.removeprefix("http://"))
        ran = _run(program)
        require(ran.returncode != 0 and "API key" in ran.stdout + ran.stderr, ran.stdout[-300:] + ran.stderr[-300:])

    return {
        "perf_analyzer: embeddings, http": lambda: embeddings("http", served.vectors.removeprefix("http://")),
        "perf_analyzer: embeddings, grpc": lambda: embeddings("grpc", served.vectors_grpc),
        "perf_analyzer: a generator's stream": stream, "perf_analyzer: without a key": without_key,
    }  # fmt: skip


def _program(model: str, protocol: str, address: str) -> list[str]:
    return [str(Path(sys.prefix) / "bin" / "perf_analyzer"), "-m", model, "-i", protocol, "-u", address, *_WINDOWS]


def _measure(served: ServedPair, model: str, protocol: str, address: str, *options: str) -> None:
    ran = _run([*_program(model, protocol, address), "-H", f"authorization: Bearer {served.key}", *options])
    require(ran.returncode == 0, f"exit {ran.returncode}: {ran.stdout[-400:]} {ran.stderr[-400:]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    prefix = Path(sys.prefix)
    folders = [*prefix.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib"), *prefix.glob("usr/lib/*-linux-gnu")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}
    ran: Any = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
    )  # fmt: skip
    require("libb64" not in ran.stderr, f"{ran.stderr.strip()}; install it: apt-get install libb64-0d")
    return ran  # type: ignore[no-any-return]
