"""The CPU at hand, as far as arithmetic depends on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from builders.artifacts import Processor


def this_processor() -> Processor:
    import openvino

    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return read_processor(text, tuple(map(str, capabilities)), os.cpu_count() or 1)


def read_processor(cpuinfo: str, capabilities: tuple[str, ...], cores: int) -> Processor:
    """`cpuinfo` as /proc has it; without one, no extension is known."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first core
    flags = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx")))
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Processor(name=name, cores=cores, flags=tuple(flags), capabilities=tuple(sorted(capabilities)))
