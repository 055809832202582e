"""`make bench-shard`: memory and time of sharding a model of several gigabytes, against a plain copy of its weights.

Both are warm: the source lies in the page cache, and what was written before has gone to disk. Rounds alternate between
the copy and the layouts, each layout in a process of its own, so that the peak is its own. Everything written is
removed again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from builders.errors import MachineError
from measure.bench.decoder_graph import DecoderShape, write_decoder

SHAPE = DecoderShape(layers=16)  # 1.2 billion parameters, 4.9 GB
LAYOUTS = ((2, 1), (2, 2))
ROUNDS = 3
_RUN_SECONDS = 600
_DISK_COPIES = 3  # the source, the copy or the ranks, and air


@dataclass(frozen=True)
class Run:
    """`rank_bytes` are the weights of the fullest rank."""

    seconds: float
    peak_bytes: int
    rank_bytes: int
    ideal_bytes: int


def shard_once(graph: Path, tensor: int, pipeline: int, out: Path) -> Run:
    """One layout in a fresh process. The time is that of the call: neither the start of Python nor imports."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_shard, graph, tensor, pipeline, out).result(timeout=_RUN_SECONDS)


def _shard(graph: Path, tensor: int, pipeline: int, out: Path) -> Run:
    from builders.partition.cut.shard import partition_graph

    started = time.perf_counter()
    partition = partition_graph(graph, tensor, pipeline, out)
    seconds = time.perf_counter() - started
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # kB; ru_maxrss counts the parent too
    return Run(seconds, int(peak) * 1024, partition.rank_bytes, partition.ideal_bytes)


def _copy_once(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True, timeout=_RUN_SECONDS)
    return time.perf_counter() - started


def _measure(graph: Path, rounds: int) -> tuple[list[float], dict[tuple[int, int], list[Run]]]:
    data, target = graph.with_name(f"{graph.name}.data"), graph.with_name("out")
    copies: list[float] = []
    runs: dict[tuple[int, int], list[Run]] = {layout: [] for layout in LAYOUTS}
    _copy_once(data, target)  # fills the page cache
    target.unlink()
    for _ in range(rounds):
        os.sync()
        copies.append(_copy_once(data, target))
        target.unlink()
        for layout in LAYOUTS:
            os.sync()
            runs[layout].append(shard_once(graph, *layout, target))
            shutil.rmtree(target)
    return copies, runs


def _print(weights: int, copies: list[float], runs: dict[tuple[int, int], list[Run]]) -> None:
    from rich.console import Console
    from rich.table import Table

    copy = median(copies)
    load = os.getloadavg()[0]
    title = f"{weights / 1e9:.2f} GB of weights; cp {copy:.2f} s; {os.cpu_count()} cores, load {load:.1f}"
    table = Table(title=title, title_justify="left")
    for heading in ("layout", "peak RSS", "of weights", "time", "of cp", "a rank holds", "ideal 1/N", "over ideal"):
        table.add_column(heading, justify="right")
    for (tensor, pipeline), found in runs.items():
        peak, seconds = max(run.peak_bytes for run in found), median(run.seconds for run in found)
        held, ideal = found[0].rank_bytes, found[0].ideal_bytes
        table.add_row(
            f"{tensor} x {pipeline}",
            f"{peak / 1e6:.0f} MB",
            f"{peak / weights:.1%}",
            f"{seconds:.2f} s",
            f"{seconds / copy:.2f}",
            f"{held / 1e6:.0f} MB",
            f"{ideal / 1e6:.0f} MB",
            f"{held / ideal - 1:+.1%}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-shard", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk that is to be measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-shard-", dir=options.folder) as scratch:
        graph = Path(scratch) / "model.onnx"
        weights = write_decoder(SHAPE, graph)
        free = shutil.disk_usage(scratch).free
        if free < (_DISK_COPIES - 1) * weights:
            raise MachineError(
                f"disk of {options.folder}",
                got=f"{free / 1e9:.1f} GB free",
                expected=f"{(_DISK_COPIES - 1) * weights / 1e9:.1f} GB",
                fix="free space, or choose another --folder",
            )
        _print(weights, *_measure(graph, options.rounds))


if __name__ == "__main__":
    main()
