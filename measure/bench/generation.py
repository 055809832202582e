"""`make bench-generation`: streams from Triton against the bare executor loop and against what people use today.

A Llama-shaped model of 100 M random weights, prompts of 64 tokens and 64 new ones, greedy. Everything in one run, so
that ratios hold on a noisy machine. Peers that are not installed are left out (`make bench-install` brings them).
"""

from __future__ import annotations

import argparse
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.commands import show
from builders.pipeline import Build
from builders.spec import DeploymentSpec
from measure.bench.bare_loop import BareLoop, bare_loop, mean_loop
from measure.bench.generation_peer_process import Workload
from measure.bench.generation_peers import GenerationPeer, run_all
from measure.bench.random_llama import random_llama, random_prompts
from runtime.client import Client
from runtime.errors import ServerFault
from runtime.generation.grouping import pool_for
from runtime.generation.opening import open_engine
from runtime.server.supervise import ready_server
from runtime.settings import GeneratorModelSettings
from runtime.step import Batch, StepExecutor

PROMPT_TOKENS = NEW_TOKENS = 64
STREAMS = {1: 4, 8: 24, 32: 64}  # concurrent -> requests in all
CONTEXTS = (128, 512, 2048)
CONTEXT_ROWS = (1, 8)
STEPS = 12
WAIT_S = 300.0


@dataclass
class Streams:
    """A closed loop: as many requests under way as there are streams. Seconds."""

    streams: int
    tokens: int = 0
    elapsed: float = 0.0
    client_cpu: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.elapsed


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--precisions", nargs="+", default=["w8", "w4"])
    parser.add_argument("--openvino-exporter", help="path of optimum-cli, in an environment of its own")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    console, folder = Console(width=120), arguments.build_dir / "bench"
    model = random_llama(folder / "llama-100m")
    console.print(f"{model.name}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {os.cpu_count()} cores")
    peers: list[GenerationPeer] = []
    for precision in arguments.precisions:
        with show.build_progress(quiet=False) as report:
            built = pipeline.build(_spec(model, precision), "cpu", folder, "repository", report)
        bare = _with_executor(built, _bare)
        by_context = _with_executor(built, _contexts)
        served = _serve(built)
        console.print(_served_table(precision, served, bare))
        console.print(_context_table(precision, by_context))
    if not arguments.no_peers:
        peers = run_all(model, folder / "peers", Workload(), openvino_exporter=arguments.openvino_exporter)
    if peers:
        console.print(_peer_table(peers))


def _spec(model: Path, precision: str) -> DeploymentSpec:
    return DeploymentSpec.model_validate(
        {
            "name": f"llama-{precision}",
            "model": {"source": str(model), "task": "generation", "max_length": max(CONTEXTS)},
            "precision": {"cpu": precision, "max_perplexity_ratio": 1.5},  # random weights say nothing either way
            "generation": {"slots": max(STREAMS)},
        }
    )


def _with_executor(built: Build, measure: Callable[[StepExecutor, GeneratorModelSettings], Any]) -> Any:
    """In this process, with the very settings and files that are served."""
    assert built.entry is not None
    directory = built.entry.repository / built.spec.name / str(built.entry.version)
    settings = GeneratorModelSettings.load(directory)
    engine, _ = open_engine(settings, directory)
    try:
        return measure(engine.executor, settings)
    finally:
        engine.executor.close()


def _bare(executor: StepExecutor, settings: GeneratorModelSettings) -> dict[int, BareLoop]:
    """Two rounds for each number of rows, taken together: as noisy as what it is compared with."""
    pool = pool_for(PROMPT_TOKENS + NEW_TOKENS, settings.capacities)
    rounds = [{rows: bare_loop(executor, pool, rows, PROMPT_TOKENS, NEW_TOKENS) for rows in STREAMS} for _ in range(2)]
    return {rows: mean_loop([done[rows] for done in rounds]) for rows in STREAMS}


def _contexts(executor: StepExecutor, settings: GeneratorModelSettings) -> dict[tuple[int, int], float]:
    """Milliseconds of one decode step by (rows, context): the median of a few."""
    found = {}
    for context in CONTEXTS:
        pool = pool_for(context, settings.capacities)
        for rows in CONTEXT_ROWS:
            ids, times = np.ones((rows, 1), np.int64), []
            for step in range(STEPS):
                started = time.perf_counter()
                executor.run([Batch(pool, 0, ids, np.full(rows, context - STEPS + step, np.int64))])
                times.append(time.perf_counter() - started)
            found[rows, context] = float(np.median(times)) * 1e3
    return found


def _serve(built: Build) -> list[Streams]:
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        _run(server.grpc_address, built.spec.name, 2, 2)  # warm
        return [_run(server.grpc_address, built.spec.name, streams, count) for streams, count in STREAMS.items()]


def _run(address: str, model: str, streams: int, requests: int) -> Streams:
    result, lock = Streams(streams), threading.Lock()
    prompts = list(random_prompts(requests, PROMPT_TOKENS, 32_000, seed=time.time_ns() % 2**32))  # nothing to reuse
    faults: list[BaseException] = []

    def ask() -> None:
        try:
            with Client(address) as client:
                while True:
                    with lock:
                        if not prompts:
                            return
                        prompt = prompts.pop()
                    first, between, tokens = _ask(client, model, prompt)
                    with lock:
                        result.first.append(first)
                        result.between += between
                        result.tokens += tokens
        except BaseException as fault:  # noqa: BLE001 - told by the thread that waits
            faults.append(fault)

    threads = [threading.Thread(target=ask) for _ in range(streams)]
    started, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        if thread.is_alive():
            raise ServerFault(f"{streams} streams were not done after {WAIT_S:.0f} s")
    result.elapsed, result.client_cpu = time.perf_counter() - started, time.process_time() - cpu
    if faults:
        raise faults[0]
    return result


def _ask(client: Client, model: str, prompt: NDArray[np.int64]) -> tuple[float, list[float], int]:
    """Seconds to the first token; for each further one, its share of the pause before its response; how many came."""
    options = {"input_ids": [int(token) for token in prompt], "max_tokens": NEW_TOKENS, "min_length": NEW_TOKENS}
    started = time.perf_counter()
    arrivals = [(time.perf_counter(), len(chunk.tokens)) for chunk in client.stream(model, None, options)]
    gaps = [(now - before) / count for (before, _), (now, count) in itertools.pairwise(arrivals) for _ in range(count)]
    return arrivals[0][0] - started, gaps, sum(count for _, count in arrivals)


def _served_table(precision: str, served: list[Streams], bare: dict[int, BareLoop]) -> Any:
    heads = ("streams", "tokens/s", "TTFT p50", "p99 ms", "a token p50", "p99 ms", "client CPU", "bare loop", "ratio")
    table = _table(f"{precision}: streamed over gRPC, against the executor alone at the same batch", heads)
    for run in served:
        alone = bare[run.streams].tokens_per_second
        first, between = (np.percentile(times, (50, 99)) * 1e3 for times in (run.first, run.between))
        table.add_row(
            str(run.streams), f"{run.tokens_per_second:.0f}", f"{first[0]:.0f}", f"{first[1]:.0f}",
            f"{between[0]:.1f}", f"{between[1]:.1f}", f"{run.client_cpu / run.elapsed / (os.cpu_count() or 1):.0%}",
            f"{alone:.0f}", f"{run.tokens_per_second / alone:.2f}",
        )  # fmt: skip
    return table


def _context_table(precision: str, found: dict[tuple[int, int], float]) -> Any:
    table = _table(f"{precision}: one decode step, ms", ("rows", *(f"context {context}" for context in CONTEXTS)))
    for rows in CONTEXT_ROWS:
        table.add_row(str(rows), *(f"{found[rows, context]:.1f}" for context in CONTEXTS))
    return table


def _peer_table(peers: list[GenerationPeer]) -> Any:
    table = _table("peers, in process: tokens/s from prompts to the last token", ("peer", *map(str, STREAMS), "note"))
    for peer in peers:
        by_batch = {timing.batch: f"{timing.tokens_per_s:.0f}" for timing in peer.timings}
        table.add_row(peer.name, *(by_batch.get(rows, "") for rows in STREAMS), peer.skipped or "")
    return table


def _table(title: str, heads: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    return table


if __name__ == "__main__":
    from builders.__main__ import run as run_command

    run_command(main)
