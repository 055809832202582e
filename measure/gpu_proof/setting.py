"""What is measured, where, and for how long. The dry run is the same script with a CPU, tiny shapes and stand-ins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import DeviceLimits, EncoderShape

FLAVOURS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")
LLAMA_8B = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256)
MINILM = EncoderShape("MiniLM", layers=6, hidden=384, heads=12, ffn=1536)
BERT_BASE = EncoderShape("BERT-base", layers=12, hidden=768, heads=12, ffn=3072)

MOST_CALLS = 200
_WARM_CALLS = 2  # the first ones load modules, choose kernels and fill allocators
Case = tuple[Measured, Callable[[Measured], Measured]]


class NotRun(Exception):
    """A section or a case that this machine cannot run. The message is the reason that the result shows."""


@dataclass(frozen=True)
class Setting:
    """The sizes are those for a GPU. `target` is what engines are built for."""

    scratch: Path
    target: str
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["float16", "float32"] = "float16"
    compiler: str = "inductor"  # torch.compile's backend
    decoder_name: str = "Llama-8B shape"
    decoder: DecoderShape = LLAMA_8B
    decode_rows: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (512, 4096)
    depths: tuple[int, int] = (2, 4)  # layers of decoder engines: see `decoder_engines`
    encoders: tuple[EncoderShape, ...] = (MINILM, BERT_BASE)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    lengths: tuple[int, ...] = (32, 128, 256)
    copy_bytes: int = 4 << 30
    product_size: int = 8192
    steps: int = 64  # of a loop that is timed
    least_calls: int = 5
    most_seconds: float = 0.5  # of one timing
    limits: DeviceLimits | None = None  # of the device, once they are measured
    deadline: float = math.inf  # of a section, on the monotonic clock, which all processes of a machine share

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def precision(self) -> Literal["fp16", "fp32"]:
        """Of the exported graphs."""
        return "fp16" if self.dtype == "float16" else "fp32"

    @property
    def value_bytes(self) -> int:
        return 2 if self.dtype == "float16" else 4


def dry(scratch: Path) -> Setting:
    """`sm89`: TensorRT for RTX builds an engine for it here, which nothing here can run."""
    return Setting(
        scratch,
        "sm89",
        device="cpu",
        dtype="float32",
        compiler="eager",  # Dynamo traces as it does for Inductor, whose C++ would take a minute to compile
        decoder_name="tiny Llama",
        decoder=DecoderShape(layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocabulary=320),
        decode_rows=(1, 4),
        contexts=(32, 64),
        depths=(1, 2),
        encoders=(EncoderShape("tiny BERT", layers=2, hidden=32, heads=4, ffn=64, vocabulary=400),),
        batches=(1, 4),
        lengths=(16, 32),
        copy_bytes=16 << 20,
        product_size=256,
        steps=6,
        least_calls=3,
        most_seconds=0.05,
    )


def in_time(setting: Setting, cases: Iterable[Case], least_s: float = 0.0) -> Iterator[Measured]:
    """Each row as its function measures it. It says so where that raises NotRun, and "time" where the section has not
    twice the longest case's time left, or less than `least_s` (the dry run's cases are short).
    """
    longest = 0.0 if setting.dry else least_s / 2
    for row, measure in cases:
        began = time.monotonic()
        if setting.left_s < 2 * longest:
            found = replace(row, reason="time")
        else:
            try:
                found = measure(row)
            except NotRun as refused:
                found = replace(row, reason=str(refused))
        longest = max(longest, time.monotonic() - began)
        yield found


def device_seconds(call: Callable[[], object], setting: Setting) -> float:
    """Median time of a call that leaves its work on the device's stream."""
    if setting.device == "cpu":
        return host_seconds(call, setting)
    import torch

    event: Any = torch.cuda.Event

    def once() -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return _median(once, setting)


def host_seconds(call: Callable[[], object], setting: Setting) -> float:
    """Median time of a call that returns when its work is done."""

    def once() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return _median(once, setting)


def _median(once: Callable[[], float], setting: Setting) -> float:
    """At least `least_calls`, then until `most_seconds` are over or `MOST_CALLS` are done."""
    for _ in range(_WARM_CALLS):
        once()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < MOST_CALLS:
        times.append(once())
        if len(times) >= setting.least_calls and time.monotonic() - began > setting.most_seconds:
            break
    return median(times)
