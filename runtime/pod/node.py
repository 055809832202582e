"""What this node and this image can run: the TensorRT that is installed, and the GPU that is visible."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from dataclasses import dataclass
from importlib import metadata

from runtime.gpu import visible_targets

_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")


@dataclass(frozen=True)
class Node:
    """`tensorrt` maps a flavour to its version, for those that are here; `target` is the SM of the first GPU."""

    tensorrt: dict[str, str]
    target: str | None

    @staticmethod
    def find() -> Node:
        targets = visible_targets()
        return Node(_tensorrt_versions(), targets[0] if targets else None)

    def __str__(self) -> str:
        flavours = ", ".join(f"{name} {version}" for name, version in self.tensorrt.items()) or "no TensorRT"
        return f"{flavours} on {self.target or 'no GPU'}"


def _tensorrt_versions() -> dict[str, str]:
    found = {}
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        found["tensorrt-rtx"] = metadata.version("tensorrt-rtx")
    version = _library_version()
    if version is not None:
        found["tensorrt"] = version
    return found


def _library_version() -> str | None:
    """NVIDIA's Triton image holds the library without its Python module, so the library itself is asked.

    `getInferLibVersion` gives major * 10000 + minor * 100 + patch since TensorRT 10.
    """
    for name in _LIBRARIES:
        try:
            number = int(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def same_release(one: str, other: str) -> bool:
    """Engines load in the release that built them: major, minor and patch, whatever the build number."""
    return one.split(".")[:3] == other.split(".")[:3]
