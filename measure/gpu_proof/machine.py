"""The first sections: what the machine is, and what its device can do at most."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.errors import TriremeError
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits
from measure.gpu_proof.setting import Budget, NotRun, Setting
from measure.gpu_proof.timing import device_seconds, host_seconds
from runtime.gpu import visible_gpus

if TYPE_CHECKING:
    from builders.spec import Flavour

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
_PACKAGES = (
    "torch", "triton", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "polygraphy",
    "tritonclient", "nvidia-pytriton", "vllm", "numpy",
)  # fmt: skip
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def gpu_facts() -> list[dict[str, str]]:
    """What the driver says of each visible GPU; empty without one."""
    return [dict(zip(_QUERY.split(","), facts, strict=True)) for facts in visible_gpus(_QUERY)]


def processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def describe(setting: Setting, _: Limits | None, budget: Budget) -> Iterator[Row]:
    for number, facts in enumerate(gpu_facts()):
        yield Row(f"GPU {number}", "driver", facts=facts)
    yield Row(
        "host", "system", facts={"processor": processor_name(), "cores": str(os.cpu_count()), **_python_versions()}
    )
    yield _torch_facts(setting)


def _python_versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_facts(setting: Setting) -> Row:
    if importlib.util.find_spec("torch") is None:
        return Row("torch", "device", reason="no module torch")
    import torch

    if setting.device == "cpu" or not torch.cuda.is_available():
        return Row("torch", "device", facts={"CUDA": str(torch.version.cuda), "threads": str(torch.get_num_threads())})
    found = torch.cuda.get_device_properties(0)
    nccl: Any = torch.cuda.nccl
    facts = {
        "device": found.name,
        "SM": f"{found.major}.{found.minor}",
        "multiprocessors": str(found.multi_processor_count),
        "memory": f"{found.total_memory / 1e9:.1f} GB",
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, nccl.version())),
    }
    return Row("torch", "device", facts=facts)


def one_layer(setting: Setting, _: Limits | None, budget: Budget, *, flavour: Flavour) -> Iterator[Row]:
    """Whether this TensorRT builds for the device at all; where it refuses, its own words are the reason."""
    seconds = try_flavour(flavour, setting)
    yield Row(f"a network of one layer for {setting.target}", flavour, figures={"build_s": seconds})


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
        profiles = (ProfileSlice(batch=one, length=one),)
        return compile_plan(file, flavour, setting.target, profiles, inputs).seconds
    except ModuleNotFoundError as error:
        raise NotRun(f"no module {error.name}") from error
    except TriremeError as error:
        raise NotRun(str(error)) from error


def limits(setting: Setting, _: Limits | None, budget: Budget) -> Iterator[Row]:
    """Measured in the same run, since clocks and cooling differ from one machine to the next."""
    require_torch(setting)
    yield _copies(setting)
    for dtype in ("float16", "bfloat16") if setting.device == "cuda" else ("float32",):
        yield _products(setting, dtype, limit=dtype == setting.dtype)
    yield _to_device(setting)
    yield _launches(setting)


def require_torch(setting: Setting) -> None:
    """Raises NotRun where torch cannot compute on the device."""
    if importlib.util.find_spec("torch") is None:
        raise NotRun("no module torch")
    import torch

    if setting.device == "cuda" and not torch.cuda.is_available():
        raise NotRun(f"torch {torch.__version__} does not see the GPU")
    if setting.dry:
        torch.set_num_threads(1)  # tiny shapes: threads that wait for each other would take most of the time


def _copies(setting: Setting) -> Row:
    import torch

    size = setting.copy_bytes
    if setting.device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = device_seconds(lambda: target.copy_(source), setting)
    rate = 2 * size / seconds / 1e9
    return Row("copy on the device", "torch", figures={"copy_gb_per_s": rate}, note="bytes read and bytes written")


def _products(setting: Setting, dtype: str, *, limit: bool) -> Row:
    """Random values: on zeros the chip draws less power and clocks higher."""
    import torch

    size = setting.product_size
    left, right = (torch.randn(size, size, device=setting.device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(left)
    seconds = device_seconds(lambda: torch.mm(left, right, out=out), setting)
    rate = 2 * size**3 / seconds / 1e12
    name = "product_tflop_per_s" if limit else f"{dtype}_tflop_per_s"
    return Row(f"matrix product {size}³, {dtype}", "torch", figures={name: rate})


def _to_device(setting: Setting) -> Row:
    import torch

    size = min(setting.copy_bytes, 256 << 20)
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=setting.device == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=setting.device)
    seconds = device_seconds(lambda: target.copy_(source, non_blocking=True), setting)
    return Row("copy from pinned memory to the device", "torch", figures={"gb_per_s": size / seconds / 1e9})


def _launches(setting: Setting) -> Row:
    """Host time of one small operation where many are queued: what a step of many kernels pays without a graph."""
    import torch

    x, count = torch.zeros(16, device=setting.device), 1000

    def many() -> None:
        for _ in range(count):
            x.add_(1)
        if setting.device == "cuda":
            torch.cuda.synchronize()

    figures = {"us": host_seconds(many, setting) / count * 1e6}
    return Row("one operation launched from Python", "torch eager", figures=figures, note=f"of {count} in a row")
