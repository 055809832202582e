"""`make demo`: the main job on real input, in one go.

Real all-MiniLM-L6-v2 weights become checked ONNX graphs, TensorRT engines for four GPUs and a Triton model repository;
the embedded Triton serves it; Locust measures it. A second run builds nothing that has not changed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.__main__ import run
from builders.commands import show
from builders.commands.load_plan import LoadRequest, measure
from builders.judging import corpus
from builders.pipeline import Build
from builders.spec import load_spec
from loadtest.report.record import LoadReport
from loadtest.report.slo import check_slo
from runtime.server.launch import TritonServer
from runtime.server.supervise import ready_server

QUERY = "read a date and time from text"
CANDIDATES = 1000
NEIGHBOURS = 3
USERS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="the main job on real input")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--duration-s", type=int, default=15, help="of each load test")
    arguments = parser.parse_args()
    spec = load_spec("minilm")
    started = time.monotonic()
    print(f"1. build {spec.name}: checkpoint, graphs, engines, model repositories", flush=True)
    with show.build_progress(quiet=False) as report:
        cpu = pipeline.build(spec, "cpu", arguments.build_dir, "repository", report)
        gpu = pipeline.build(spec, "gpu", arguments.build_dir, "repository", report)
    built_s = time.monotonic() - started
    show.print_choice(cpu)
    print(f"   {built_s:.1f} s\n\n2. serve with the embedded Triton", flush=True)
    assert cpu.entry is not None
    begun = time.monotonic()
    with ready_server(cpu.entry.repository) as server:
        print(f"   ready after {time.monotonic() - begun:.1f} s, proven on this machine: {server.proven}", flush=True)
        print(f"\n3. ask it: {QUERY!r}", flush=True)
        for score, text in _neighbours(server.grpc_address, spec.name, corpus.texts(None, CANDIDATES)):
            print(f"   {score:.3f}  {text[:100]}", flush=True)
        print(f"\n4. load: {USERS} users, {arguments.duration_s} s each over gRPC and HTTP", flush=True)
        reports = _load(cpu, server, arguments.build_dir, arguments.duration_s)
        proven = str(server.proven)
    _print_table(cpu, gpu, proven, reports)
    missed = [sentence for found in reports.values() for sentence in check_slo(found, spec.slo)]
    if missed:
        raise SystemExit("error: the SLO is missed. " + " ".join(missed))


def _neighbours(address: str, model: str, texts: Sequence[str]) -> list[tuple[float, str]]:
    vectors = _embed(address, model, [QUERY, *texts])
    scores = vectors[1:] @ vectors[0]
    return [(float(scores[index]), texts[index]) for index in np.argsort(-scores)[:NEIGHBOURS]]


def _embed(address: str, model: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of the texts, 32 in a request."""
    from runtime.client import Client

    with Client(address) as client:
        return np.concatenate([client.vectors(model, texts[start : start + 32]) for start in range(0, len(texts), 32)])


def _load(built: Build, server: TritonServer, folder: Path, duration_s: int) -> dict[str, LoadReport]:
    request = LoadRequest(
        grpc=server.grpc_address,
        http=server.http_address,
        metrics=server.metrics_address,
        users=USERS,
        duration_s=duration_s,
    )
    reports = {}
    for protocol in ("grpc", "http"):
        output = folder / built.spec.name / f"load-{protocol}.json"
        with show.load_progress(quiet=False) as progress:
            reports[protocol] = measure(built.spec, replace(request, protocol=protocol), output, progress)
        print(f"   {protocol}: report in {output.with_suffix('.html')}", flush=True)
    return reports


def _print_table(cpu: Build, gpu: Build, proven: str, reports: dict[str, LoadReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"\n{cpu.spec.name}", title_justify="left")
    for heading in ("what", "figures"):
        table.add_column(heading)
    for name, value in show.build_rows(cpu, gpu):
        table.add_row(name, value)
    table.add_row("proven where it serves", proven)
    for protocol, report in reports.items():
        table.add_row(f"served over {protocol}", _figures(report))
    Console(width=110).print(table)


def _figures(report: LoadReport) -> str:
    seen: Any = report.figures
    errors = sum(seen.errors.values())
    return (
        f"{seen.texts_per_s:.0f} sentences/s, p50 {seen.p50_ms:.0f} ms, p95 {seen.p95_ms:.0f} ms, "
        f"p99 {seen.p99_ms:.0f} ms, {errors} errors"
    )


if __name__ == "__main__":
    run(main)
