"""What the machine is, what its device and several of them can do at most, and which TensorRT builds for it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.errors import TriremeError
from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import NotRun, Setting, device_seconds, host_seconds
from runtime.gpu import visible_gpus
from runtime.ports import free_ports

if TYPE_CHECKING:
    from builders.spec import Flavour

_PACKAGES = (
    "torch", "triton", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "polygraphy",
    "tritonclient", "nvidia-pytriton", "vllm", "numpy",
)  # fmt: skip
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
_LAUNCHES = 1000
_SIZES = {"cuda": (8 << 10, 1 << 20, 256 << 20), "cpu": (8 << 10, 1 << 20)}  # bytes of an all-reduce


def gpu_facts() -> list[dict[str, str]]:
    """What the driver says of each visible GPU; empty without one."""
    return [dict(zip(_QUERY.split(","), facts, strict=True)) for facts in visible_gpus(_QUERY)]


def processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def describe(setting: Setting) -> Iterator[Measured]:
    for number, facts in enumerate(gpu_facts()):
        yield Measured(f"GPU {number}", "driver", facts=facts)
    host = {"processor": processor_name(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    for name in _PACKAGES:
        if next(iter(metadata.Distribution.discover(name=name)), None) is not None:
            host[name] = metadata.version(name)
    yield Measured("host", "system", facts=host)
    if importlib.util.find_spec("torch") is None:
        yield Measured("torch", "device", reason="no module torch")
        return
    import torch

    facts = {"CUDA": str(torch.version.cuda), "threads": str(torch.get_num_threads())}
    if setting.device == "cuda" and torch.cuda.is_available():
        found, nccl = torch.cuda.get_device_properties(0), torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        facts |= {"device": found.name, "SM": f"{found.major}.{found.minor}", "NCCL": ".".join(map(str, nccl))}
        facts |= {"multiprocessors": str(found.multi_processor_count), "memory": f"{found.total_memory / 1e9:.1f} GB"}
    yield Measured("torch", "device", facts=facts)


def one_layer(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    """Whether this TensorRT builds for the device at all; where it refuses, its own words are the reason."""
    seconds = try_flavour(flavour, setting)
    yield Measured(f"a network of one layer for {setting.target}", flavour, figures={"build_s": seconds})


def try_flavour(flavour: Flavour, setting: Setting) -> float:
    """Seconds to build a network of one layer. Raises NotRun with TensorRT's own words."""
    try:
        import onnx
        from onnx import TensorProto, helper

        from builders.artifacts import TensorSpec
        from builders.engine.tensorrt import compile_plan, require_tensorrt
        from builders.spec import ProfileSlice, Range

        require_tensorrt(flavour)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
        file = setting.scratch / f"one-layer-{os.getpid()}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), str(file))
        one = Range(min=1, opt=1, max=1)
        inputs = (TensorSpec(name="x", dtype="float32", dims=("batch", 8)),)
        return compile_plan(file, flavour, setting.target, (ProfileSlice(batch=one, length=one),), inputs).seconds
    except ModuleNotFoundError as error:
        raise NotRun(f"no module {error.name}") from error
    except TriremeError as error:
        raise NotRun(str(error)) from error


def require_torch(setting: Setting, *others: str) -> Any:
    """torch. Raises NotRun where it cannot compute on the device, or another module is absent."""
    for name in ("torch", *others):
        if importlib.util.find_spec(name) is None:
            raise NotRun(f"no module {name}")
    import torch

    if setting.device == "cuda" and not torch.cuda.is_available():
        raise NotRun(f"torch {torch.__version__} does not see the GPU")
    if setting.dry:
        torch.set_num_threads(1)  # tiny shapes: threads that wait for each other would take most of the time
    return torch


def limits(setting: Setting) -> Iterator[Measured]:
    """Measured in the same run, since clocks and cooling differ from one machine to the next."""
    torch = require_torch(setting)
    cuda = setting.device == "cuda"
    size = min(setting.copy_bytes, torch.cuda.mem_get_info()[0] // 4) if cuda else setting.copy_bytes
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    rate = 2 * size / device_seconds(lambda: target.copy_(source), setting) / 1e9
    yield Measured("copy on the device", "torch", figures={"copy_gb_per_s": rate}, note="bytes read and bytes written")
    size, side = min(size, 256 << 20), setting.product_size
    for dtype in ("float16", "bfloat16") if cuda else ("float32",):
        # Random values: on zeros the chip draws less power and clocks higher.
        left, right = (torch.randn(side, side, device=setting.device).to(getattr(torch, dtype)) for _ in range(2))
        rate = 2 * side**3 / device_seconds(partial(torch.mm, left, right, out=torch.empty_like(left)), setting) / 1e12
        name = "product_tflop_per_s" if dtype == setting.dtype else f"{dtype}_tflop_per_s"
        yield Measured(f"matrix product {side}³, {dtype}", "torch", figures={name: rate})
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
    seconds = device_seconds(lambda: target[:size].copy_(pinned, non_blocking=True), setting)
    yield Measured("copy from pinned memory to the device", "torch", figures={"gb_per_s": size / seconds / 1e9})
    x = torch.zeros(16, device=setting.device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)
        if cuda:
            torch.cuda.synchronize()

    # Host time of one small operation where many are queued: what a step of many kernels pays without a graph.
    figures = {"us": host_seconds(launches, setting) / _LAUNCHES * 1e6}
    yield Measured(
        "one operation launched from Python", "torch eager", figures=figures, note=f"of {_LAUNCHES} in a row"
    )


def require_gpus(setting: Setting) -> int:
    """How many there are. Raises NotRun for one alone."""
    torch = require_torch(setting)
    gpus: int = 2 if setting.dry else torch.cuda.device_count()
    if gpus < 2:
        raise NotRun("one GPU: tensor and pipeline parallelism over NCCL was not exercised")
    return gpus


def all_reduces(setting: Setting) -> Iterator[Measured]:
    """Over NCCL, a process a GPU; the dry run over gloo, two processes on the CPU."""
    ranks = require_gpus(setting)
    processes: Any = importlib.import_module("torch.multiprocessing")
    [port] = free_ports(1)
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    context = processes.start_processes(reduce_here, (ranks, port, setting, sender), ranks, join=False, daemon=True)
    sender.close()  # this end: where the ranks die, the pipe ends
    try:
        for size in _SIZES[setting.device]:
            if not receiver.poll(max(0.0, setting.left_s)):
                raise TimeoutError(f"an all-reduce of {size} bytes over {ranks} ranks did not end in time")
            seconds = receiver.recv()
            moved = 2 * (ranks - 1) / ranks * size  # what each rank sends in a ring
            figures = {"us": seconds * 1e6, "bus_gb_per_s": moved / seconds / 1e9}
            library = "NCCL" if setting.device == "cuda" else "gloo"
            yield Measured(f"all-reduce of {size >> 10} KiB over {ranks} ranks", library, figures=figures)
    finally:
        for process in context.processes:
            process.kill()


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
        seconds = device_seconds(partial(dist.all_reduce, tensor), counted)
        if rank == 0:
            sender.send(seconds)
    dist.destroy_process_group()
