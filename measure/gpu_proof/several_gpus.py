"""Several GPUs: all-reduces over NCCL, and a decoder on tensor and pipeline ranks, a process a GPU.

The dry run does the same with two processes on the CPU over gloo.
"""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from measure.gpu_proof.machine import require_torch, try_flavour
from measure.gpu_proof.record import Row
from measure.gpu_proof.setting import NotRun, Setting
from measure.gpu_proof.timing import device_seconds, in_time

_ROWS, _NEW_TOKENS = 4, 32
_END_S = 3.0  # for all ranks together to end by themselves, and again once they are killed
_LEAST_S = 40.0  # of the budget, to share out, to build and to start
_LAYOUTS = ((4, 1), (2, 1), (2, 2), (1, 2))  # tensor x pipeline; LLAMA_100M has 4 key-value heads
_SIZES = {"cuda": (8 << 10, 1 << 20, 256 << 20), "cpu": (8 << 10, 1 << 20)}


def _devices(setting: Setting) -> int:
    torch = require_torch(setting)
    ranks: int = 2 if setting.dry else torch.cuda.device_count()
    if ranks < 2:
        raise NotRun("one GPU: tensor and pipeline parallelism over NCCL was not exercised")
    return ranks


def generate(setting: Setting) -> Iterator[Row]:
    """A decoder built for several ranks as users build it, in the bare loop."""
    devices = _devices(setting)
    from measure.gpu_proof.folders import llama

    if not setting.dry:
        try_flavour("tensorrt", setting)  # TensorRT for RTX has no collectives over several GPUs
    name = llama(setting)[2]
    layouts = ((2, 1),) if setting.dry else [each for each in _LAYOUTS if each[0] * each[1] <= devices]
    cases = (
        (
            Row(f"{name} on {tensor} x {stages} ranks", "rank step executor", {"batch": _ROWS}),
            partial(_looped, setting, tensor, stages),
        )
        for tensor, stages in layouts
    )
    yield from in_time(setting, cases, _LEAST_S)


def _looped(setting: Setting, tensor: int, stages: int, row: Row) -> Row:
    from measure.bench.bare_loop import bare_loop
    from measure.gpu_proof.folders import llama, repository, spec
    from runtime.generation.opening import open_engine
    from runtime.settings import GeneratorModelSettings

    source, sizes, _ = llama(setting)
    asked = spec(
        setting, "tensorrt", f"proof-ranks-{tensor}-{stages}",
        {"source": source, "task": "generation", "max_length": sizes.context},
        parallel={"tensor": tensor, "pipeline": stages}, generation={"slots": _ROWS},
    )  # fmt: skip
    _, directory = repository(setting, asked)
    settings = GeneratorModelSettings.load(directory)
    engine, _ = open_engine(settings, directory)
    try:
        prompt, new = sizes.context // 2, min(_NEW_TOKENS, sizes.context // 2)
        pool = next(at for at, size in enumerate(settings.capacities) if size >= prompt + new)
        loop = bare_loop(engine.executor, pool, _ROWS, prompt, new)
    finally:
        engine.executor.close()
    return replace(row, figures={"tokens_per_s": loop.decode_tokens_per_second})


def measure(setting: Setting) -> Iterator[Row]:
    ranks = _devices(setting)
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=reduce_here, args=(rank, ranks, port, setting, None if rank else sender), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()  # this end: where rank 0 dies, the pipe ends
        for size in _SIZES[setting.device]:
            if not receiver.poll(max(0.0, setting.left_s)):
                raise TimeoutError(f"an all-reduce of {size} bytes over {ranks} ranks did not end in time")
            seconds = receiver.recv()
            moved = 2 * (ranks - 1) / ranks * size  # what each rank sends in a ring
            figures = {"us": seconds * 1e6, "bus_gb_per_s": moved / seconds / 1e9}
            library = "NCCL" if setting.device == "cuda" else "gloo"
            yield Row(f"all-reduce of {size >> 10} KiB over {ranks} ranks", library, figures=figures)
    finally:
        end_ranks([process for process in processes if process.pid is not None])


def end_ranks(processes: Sequence[Any]) -> None:
    """However many hang, it takes no longer than one: a section has only so much time to end."""
    _join(processes)
    for process in processes:
        process.kill()
    _join(processes)


def _join(processes: Sequence[Any]) -> None:
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def reduce_here(rank: int, ranks: int, port: int, setting: Setting, sender: Connection | None) -> None:
    """What each rank's process does; rank 0 tells the times."""
    import torch

    dist: Any = importlib.import_module("torch.distributed")
    if setting.device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0)
    dist.init_process_group("nccl" if setting.device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    # Every rank must make the same number of calls, so none decides by its own clock.
    counted = replace(setting, most_seconds=0)
    for size in _SIZES[setting.device]:
        tensor = torch.zeros(size // 4, device=setting.device)
        dist.all_reduce(tensor)
        seconds = device_seconds(partial(dist.all_reduce, tensor), counted)
        if sender is not None:
            sender.send(seconds)
    dist.destroy_process_group()
