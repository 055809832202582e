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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits
from measure.gpu_proof.setting import Budget, NotRun, Setting
from measure.gpu_proof.timing import device_seconds

_ROWS, _NEW_TOKENS = 4, 32
_END_S = 3.0  # for all ranks together to end by themselves, and again once they are killed
_LEAST_S = 40.0  # of the budget, to share out, to build and to start
_LAYOUTS = ((4, 1), (2, 1), (2, 2), (1, 2))  # tensor x pipeline; LLAMA_100M has 4 key-value heads
_SIZES = {"cuda": (8 << 10, 1 << 20, 256 << 20), "cpu": (8 << 10, 1 << 20)}


def _devices(setting: Setting) -> int:
    require_torch(setting)
    import torch

    ranks = 2 if setting.dry else torch.cuda.device_count()
    if ranks < 2:
        raise NotRun("one GPU: tensor and pipeline parallelism over NCCL was not exercised")
    return ranks


def generate(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    """A decoder built for several ranks as users build it, in the bare loop."""
    devices = _devices(setting)
    from builders import pipeline
    from builders.spec import DeploymentSpec
    from measure.bench.random_llama import LLAMA_100M
    from measure.gpu_proof.folders import TINY_LLAMA, write_llama
    from measure.gpu_proof.machine import try_flavour

    if not setting.dry:
        try_flavour("tensorrt", setting)  # TensorRT for RTX has no collectives over several GPUs
    sizes = TINY_LLAMA if setting.dry else LLAMA_100M
    source = write_llama(sizes, setting.scratch / "llama-ranks")
    layouts = ((2, 1),) if setting.dry else tuple(each for each in _LAYOUTS if each[0] * each[1] <= devices)
    for tensor, stages in layouts:
        case = f"{'tiny Llama' if setting.dry else 'Llama of 100 M weights'} on {tensor} x {stages} ranks"
        if budget.left_s < _LEAST_S and not setting.dry:
            yield Row(case, "rank step executor", reason="time")
            continue
        spec = DeploymentSpec.model_validate(
            {
                "name": f"proof-ranks-{tensor}-{stages}",
                "model": {"source": str(source), "task": "generation", "max_length": sizes.context},
                "precision": {"cpu": "fp32", "gpu": "fp16"},
                "parallel": {"tensor": tensor, "pipeline": stages},
                "engine": {"flavour": "tensorrt", "targets": [setting.target]},
                "serving": {"executor": "onnxruntime"},
                "generation": {"slots": _ROWS},
            }
        )
        built = pipeline.build(spec, "cpu" if setting.dry else "gpu", setting.scratch, "repository")
        assert built.entry is not None
        yield _looped(built.entry.repository / spec.name / str(built.entry.version), sizes.context, case)


def _looped(directory: Path, context: int, case: str) -> Row:
    from measure.bench.bare_loop import bare_loop
    from runtime.generation.opening import open_engine
    from runtime.settings import GeneratorModelSettings

    settings = GeneratorModelSettings.load(directory)
    engine, _ = open_engine(settings, directory)
    try:
        new = min(_NEW_TOKENS, context // 2)
        pool = next(at for at, size in enumerate(settings.capacities) if size >= context // 2 + new)
        loop = bare_loop(engine.executor, pool, _ROWS, context // 2, new)
    finally:
        engine.executor.close()
    return Row(case, "rank step executor", {"batch": _ROWS}, {"tokens_per_s": loop.decode_tokens_per_second})


def measure(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    ranks = _devices(setting)
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=reduce_here, args=(rank, ranks, port, setting, pipes[rank][1]), daemon=True)
        for rank in range(ranks)
    ]
    library = "NCCL" if setting.device == "cuda" else "gloo"
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        for size in _SIZES[setting.device]:
            receiver = pipes[0][0]
            if not receiver.poll(max(0.0, budget.left_s)):
                raise TimeoutError(f"an all-reduce of {size} bytes over {ranks} ranks did not end in time")
            seconds = receiver.recv()
            moved = 2 * (ranks - 1) / ranks * size  # what each rank sends in a ring
            yield Row(
                f"all-reduce of {size >> 10} KiB over {ranks} ranks",
                library,
                figures={"us": seconds * 1e6, "bus_gb_per_s": moved / seconds / 1e9},
            )
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


def reduce_here(rank: int, ranks: int, port: int, setting: Setting, sender: Connection) -> None:
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
        seconds = device_seconds(lambda tensor=tensor: dist.all_reduce(tensor), counted)  # type: ignore[misc]
        if rank == 0:
            sender.send(seconds)
    dist.destroy_process_group()
