"""`make bench-serving`: the served ensemble against the same model called in process, and against peers.

Every figure is text to vector over the same texts. The server, the client and the in-process runs share the same
cores; in-process and served runs alternate, so that noise of the machine hits all. Two in-process runs:

    plain   the very graph that is served, called through OpenVINO in length-sorted batches of 32
    bound   the service's own tokenizer, split and executor over all texts at once, which no server can have

`cold` is the first run at that many users. OpenVINO makes kernels for each shape of a batch when it first meets it,
and a server meets most of them in its first thousand requests; the other figures are of the runs after those.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.__main__ import run
from builders.artifacts import Checkpoint
from builders.judging import corpus
from builders.judging.vectors import HELD_OUT_TEXTS, measure, tokenizer_settings
from builders.repository.directories import encoder_settings
from builders.spec import DeploymentSpec, load_spec
from measure.bench import peers
from runtime.encoding.encoder import open_encoder
from runtime.encoding.tokenizer import Tokenizer
from runtime.server.launch import Ports, TritonServer
from runtime.server.supervise import Supervisor

CONCURRENCIES = (1, 8, 32)
ROUNDS = 3
REQUESTS = {1: 128, 8: 256, 32: 512}
WARM_RUNS = 3  # at each number of users; the first of them is `cold`


@dataclass(frozen=True)
class Served:
    """One closed loop: `concurrency` requests of one text each under way at all times."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    client_cpu_share: float  # of all CPU seconds that the machine had during the run
    vectors: NDArray[np.float32]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8"])
    arguments = parser.parse_args()
    console = Console(width=110)
    preset = load_spec("minilm")
    texts = _texts(preset)
    console.print(f"{len(texts)} docstrings, median {median(map(len, texts)):.0f} characters; {_machine()}")
    table = Table(title="served over gRPC, against the same model in process (texts/s, ratio)", title_justify="left")
    for heading in (
        "precision",
        "users",
        "texts/s",
        "cold",
        "p50 ms",
        "p99 ms",
        "client CPU",
        "plain",
        "ratio",
        "bound",
        "ratio",
    ):
        table.add_column(heading, justify="right")
    reference: NDArray[np.float32] | None = None
    summary = []
    for precision in arguments.precisions:
        spec = preset.model_copy(update={"precision": preset.precision.model_copy(update={"cpu": precision})})
        built = pipeline.build(spec, "cpu", arguments.build_dir / "bench" / precision, "repository")
        reference = peers.reference(built, texts) if reference is None else reference
        for concurrency, cold, served, plain, bound in _compare(built, texts):
            table.add_row(
                precision,
                str(concurrency),
                f"{served.texts_per_s:.0f}",
                f"{cold.texts_per_s:.0f}",
                f"{served.p50_ms:.1f}",
                f"{served.p99_ms:.1f}",
                f"{served.client_cpu_share:.0%}",
                f"{plain:.0f}",
                f"{served.texts_per_s / plain:.2f}",
                f"{bound:.0f}",
                f"{served.texts_per_s / bound:.2f}",
            )
        quality = measure(reference, served.vectors, "embedding", "")
        summary.append((f"Trireme {precision}, served", served.texts_per_s, quality.mean_cosine, quality.worst_cosine))
    console.print(table)
    assert reference is not None
    _print_peers(console, summary, peers.run_all(built, texts, reference))


def _texts(spec: DeploymentSpec) -> list[str]:
    """Texts that neither calibrated nor judged the INT8 graph."""
    seen = spec.precision.calibration_samples + HELD_OUT_TEXTS
    return corpus.texts(None, seen + 256)[seen:]


def _machine() -> str:
    from loadtest.report.assemble import this_machine

    machine = this_machine()
    return f"{machine.cores} cores, {machine.cpu_model}"


def _compare(built: pipeline.Build, texts: Sequence[str]) -> list[tuple[int, Served, Served, float, float]]:
    """For each concurrency the first run, the median of those once warm, and the median rates of both in-process runs
    between."""
    assert built.entry is not None
    bound = _Bound(built)
    plain = peers.openvino(built, built.served_graph.file_path, "f32" if built.spec.precision.cpu == "fp32" else "bf16")
    plain(texts)  # warm
    with TritonServer(built.entry.repository, Ports.free()) as server:
        Supervisor(server).wait_ready(120, threading.Event())
        results = []
        for concurrency in CONCURRENCIES:
            name, count = built.spec.name, REQUESTS[concurrency]
            cold, *_ = [_drive(server, name, texts, concurrency, count) for _ in range(WARM_RUNS)]
            served, plain_rates, bound_rates = [], [], []
            for _ in range(ROUNDS):
                plain_rates.append(peers.rate(plain, texts))
                bound_rates.append(bound.rate(texts))
                served.append(_drive(server, name, texts, concurrency, count))
            middle = sorted(served, key=lambda run: run.texts_per_s)[ROUNDS // 2]
            results.append((concurrency, cold, middle, median(plain_rates), median(bound_rates)))
        return results


class _Bound:
    """The service's own tokenizer, batching and executor, without the service."""

    def __init__(self, built: pipeline.Build) -> None:
        checkpoint: Checkpoint = built.checkpoint
        self._tokenizer = Tokenizer(checkpoint.path("tokenizer.json"), tokenizer_settings(checkpoint))
        settings = encoder_settings(built.spec, "cpu", [built.served_graph])
        self._encoder = open_encoder(settings, {"cpu": built.served_graph.file_path})

        self._encoder.fit(list(self._tokenizer.pad(self._tokenizer.encode(["a text"]))))

    def rate(self, texts: Sequence[str]) -> float:
        started = time.perf_counter()
        requests = [self._tokenizer.pad([item]) for item in self._tokenizer.encode(texts)]
        self._encoder.run(requests)
        return len(texts) / (time.perf_counter() - started)


def _drive(server: TritonServer, model: str, texts: Sequence[str], concurrency: int, count: int) -> Served:
    return asyncio.run(_closed_loop(server.grpc_address, model, texts, concurrency, count))


async def _closed_loop(address: str, model: str, texts: Sequence[str], concurrency: int, count: int) -> Served:
    from tritonclient.grpc import InferRequestedOutput
    from tritonclient.grpc.aio import InferenceServerClient

    client = InferenceServerClient(address)
    outputs = [InferRequestedOutput("embedding")]
    prepared = [_input(text) for text in texts]
    pending = iter(range(count))
    latencies_s: list[float] = []
    vectors: dict[int, NDArray[np.float32]] = {}

    async def user() -> None:
        for number in pending:
            index = number % len(texts)
            begun = time.perf_counter()
            result = await client.infer(model, [prepared[index]], outputs=outputs)
            latencies_s.append(time.perf_counter() - begun)
            vectors[index] = result.as_numpy("embedding")[0]

    started, cpu_before = time.perf_counter(), time.process_time()
    await asyncio.gather(*(user() for _ in range(concurrency)))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    await client.close()
    p50, p99 = np.percentile(latencies_s, [50, 99]) * 1e3
    share = cpu / (wall * (os.cpu_count() or 1))
    stacked = np.stack([vectors[index] for index in sorted(vectors)])
    return Served(count / wall, float(p50), float(p99), share, stacked)


def _input(text: str) -> Any:
    from tritonclient.grpc import InferInput

    item = InferInput("text", [1, 1], "BYTES")
    item.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    return item


def _print_peers(console: Any, served: list[tuple[str, float, float, float]], others: list[peers.Peer]) -> None:
    from rich.table import Table

    table = Table(title="text to vector, served by Trireme and in process by others", title_justify="left")
    for heading in ("what", "texts/s", "mean cosine", "worst cosine"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, rate, mean, worst in served:
        table.add_row(name, f"{rate:.0f}", f"{mean:.5f}", f"{worst:.5f}")
    for peer in others:
        table.add_row(peer.name, f"{peer.texts_per_s:.0f}", f"{peer.mean_cosine:.5f}", f"{peer.worst_cosine:.5f}")
    console.print(table)
    absent = peers.absent()
    if absent:
        console.print(f"not measured (make bench-install): {', '.join(absent)}")


if __name__ == "__main__":
    run(main)
