"""What the machine is, what its device and several of them can do at most, and which TensorRT builds for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.errors import TriremeError
from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import NotRun, lacking, seconds_of
from runtime.gpu import visible_gpus

if TYPE_CHECKING:
    from builders.spec import Flavour

_PACKAGES = (
    "torch", "triton", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "polygraphy",
    "tritonclient", "nvidia-pytriton", "numpy",
)  # fmt: skip
_QUERY = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
_ONE_LAYER = '<ir_version: 11, opset_import: ["": 24]> one (float[batch, 8] x) => (float[batch, 8] y) { y = Relu(x) }'
_REDUCTIONS = 20
_TIMES = "all-reduces.json"


def gpu_facts() -> list[dict[str, str]]:
    """What the driver says of each visible GPU; empty without one."""
    return [dict(zip(_QUERY.split(","), facts, strict=True)) for facts in visible_gpus(_QUERY)]


def processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def describe(setting: Setting) -> Iterator[Measured]:
    for number, facts in enumerate(gpu_facts()):
        yield Measured(f"GPU {number}", "driver", facts=facts)
    host = {"processor": processor_name(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _PACKAGES}
    yield Measured("host", "system", facts=host | {name: each.version for name, each in found.items() if each})


def one_layer(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    """Whether this TensorRT builds for the device at all; where it refuses, its own words are the reason."""
    seconds = try_flavour(flavour, setting)
    yield Measured(f"a network of one layer for {setting.target}", flavour, figures={"build_s": seconds})


def try_flavour(flavour: Flavour, setting: Setting) -> float:
    """Seconds to build a network of one layer. Raises NotRun with TensorRT's own words."""
    try:
        import onnx

        from builders.engine.tensorrt import compile_plan, decoder_profiles, require_tensorrt
        from builders.graph import describe as describe_graph

        require_tensorrt(flavour)
        with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
            file = Path(folder, "one-layer.onnx")
            onnx.save(onnx.parser.parse_model(_ONE_LAYER), str(file))
            inputs, _, _ = describe_graph(file)
            return compile_plan(file, flavour, setting.target, decoder_profiles(1, 1)[:1], inputs).seconds
    except (ModuleNotFoundError, TriremeError) as error:
        raise NotRun(lacking(error) or str(error)) from error


def require_torch(setting: Setting, *others: str) -> Any:
    """torch. Raises NotRun where it cannot compute on the device, or another module is absent."""
    for name in ("torch", *others):
        if importlib.util.find_spec(name) is None:
            raise NotRun(f"no module {name}")
    import torch

    if not setting.dry and not torch.cuda.is_available():
        raise NotRun(f"torch {torch.__version__} does not see the GPU")
    if setting.dry:
        torch.set_num_threads(1)  # tiny shapes: threads that wait for each other would take most of the time
    return torch


def limits(setting: Setting) -> Iterator[Measured]:
    """Measured in the same run, since clocks and cooling differ from one machine to the next."""
    torch = require_torch(setting)
    size = setting.copy_bytes if setting.dry else min(setting.copy_bytes, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    rate = 2 * size / seconds_of(lambda: target.copy_(source), setting) / 1e9
    yield Measured("copy on the device", "torch", figures={"copy_gb_per_s": rate}, note="bytes read and bytes written")
    size, side = min(size, 256 << 20), setting.product_size
    for dtype in dict.fromkeys((setting.dtype, "float32" if setting.dry else "bfloat16")):
        # Random values: on zeros the chip draws less power and clocks higher.
        left, right = (torch.randn(side, side, device=setting.device).to(getattr(torch, dtype)) for _ in range(2))
        rate = 2 * side**3 / seconds_of(partial(torch.mm, left, right, out=torch.empty_like(left)), setting) / 1e12
        name = "product_tflop_per_s" if dtype == setting.dtype else f"{dtype}_tflop_per_s"
        yield Measured(f"matrix product {side}³, {dtype}", "torch", figures={name: rate})
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=not setting.dry)
    seconds = seconds_of(lambda: target[:size].copy_(pinned, non_blocking=True), setting)
    yield Measured("copy from pinned memory to the device", "torch", figures={"gb_per_s": size / seconds / 1e9})
    x = torch.zeros(16, device=setting.device)
    figures = {"us": seconds_of(lambda: x.add_(1), setting) * 1e6}
    # What a step of many kernels pays for each without a graph.
    yield Measured("one small operation launched from Python, of many in a row", "torch eager", figures=figures)


def require_gpus(setting: Setting) -> int:
    """How many there are. Raises NotRun for one alone."""
    torch = require_torch(setting)
    gpus: int = 2 if setting.dry else torch.cuda.device_count()
    if gpus < 2:
        raise NotRun("one GPU: tensor and pipeline parallelism over NCCL was not exercised")
    return gpus


def all_reduces(setting: Setting) -> Iterator[Measured]:
    """Over NCCL, a process a GPU; the dry run over gloo, two processes on the CPU."""
    ranks, library = require_gpus(setting), "gloo" if setting.dry else "nccl"
    importlib.import_module("torch.multiprocessing").spawn(_reduce, (ranks, library, setting), ranks)
    for size, seconds in json.loads((setting.scratch / _TIMES).read_text()):
        moved = 2 * (ranks - 1) / ranks * size  # what each rank sends in a ring
        figures = {"us": seconds * 1e6, "bus_gb_per_s": moved / seconds / 1e9}
        yield Measured(f"all-reduce of {size >> 10} KiB over {ranks} ranks", library, figures=figures)


def _reduce(rank: int, ranks: int, library: str, setting: Setting) -> None:
    """What each rank's process does; rank 0 writes the times down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch has it sent where the section ends before its ranks
    import torch

    dist: Any = importlib.import_module("torch.distributed")
    if not setting.dry:
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(setting.scratch / "all-reduces"), ranks)
    dist.init_process_group(library, store=store, rank=rank, world_size=ranks)
    times = []
    for size in (8 << 10, 1 << 20, *([] if setting.dry else [256 << 20])):
        tensor = torch.zeros(size // 4, device=setting.device)
        times.append((size, seconds_of(partial(dist.all_reduce, tensor), setting, calls=_REDUCTIONS)))
    if rank == 0:
        (setting.scratch / _TIMES).write_text(json.dumps(times))
    dist.destroy_process_group()
