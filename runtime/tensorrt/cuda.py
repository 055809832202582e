"""The CUDA runtime, as far as serving needs it: memory, copies, one stream and graphs of it.

**Not run on a GPU yet.** The signatures are those of CUDA 12 and 13; the tests call them through ctypes on a stand-in
that keeps the "device" in host memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment, ServerFault
from runtime.gpu import named_devices

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: TensorRT and graph capture want a stream apart from the default one
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads call does not spoil a capture


class PitchedPointer(Structure):
    _fields_ = [("ptr", c_void_p), ("pitch", c_size_t), ("xsize", c_size_t), ("ysize", c_size_t)]


class Extent(Structure):
    _fields_ = [("width", c_size_t), ("height", c_size_t), ("depth", c_size_t)]


class _Position(Structure):
    _fields_ = [("x", c_size_t), ("y", c_size_t), ("z", c_size_t)]


class Copy3D(Structure):
    """cudaMemcpy3DParms"""

    _fields_ = [
        ("source_array", c_void_p), ("source_position", _Position), ("source", PitchedPointer),
        ("target_array", c_void_p), ("target_position", _Position), ("target", PitchedPointer),
        ("extent", Extent), ("kind", c_int),
    ]  # fmt: skip


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMallocHost": (POINTER(c_void_p), c_size_t),
    "cudaFreeHost": (c_void_p,),
    "cudaMemsetAsync": (c_void_p, c_int, c_size_t, c_void_p),
    "cudaMemset3DAsync": (PitchedPointer, c_int, Extent, c_void_p),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemcpy3DAsync": (POINTER(Copy3D), c_void_p),
    "cudaStreamCreateWithFlags": (POINTER(c_void_p), c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    # Not cudaGraphInstantiate: its arguments are others in CUDA 11 than since 12.
    "cudaGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaGetLastError": (),
}


class DeviceLost(ServerFault):
    """An error on the device that every later call returns too: only a new process can use the GPU again."""


class Box(NamedTuple):
    """`slices` x `lines` lines on the device, line l of slice s at `address + (s * slice_lines + l) * pitch` bytes."""

    address: int
    pitch: int
    slice_lines: int
    slices: int
    lines: int


class Cuda:
    """Device 0 and one stream on it. What is taken here is given back by `close`. For one thread at a time.

    Every call is checked: ServerFault says which one failed and how. Copies and zeroing are in the order of the stream.
    """

    def __init__(self, library: Any) -> None:
        """`library` is what `load_runtime` gives."""
        self._library = library
        self._device_memory: set[int] = set()
        self._pinned: set[int] = set()
        self._graphs: set[int] = set()
        stream = c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = stream.value or 0

    def device(self, nbytes: int) -> int:
        """Zeroed memory, aligned to 256 bytes as cudaMalloc does: a masked NaN would still spoil a sum."""
        pointer = c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), max(nbytes, 1))
        address = pointer.value or 0
        self._device_memory.add(address)
        self.zero(address, nbytes)
        return address

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies need not stage. The array must not be used after `close`."""
        pointer = c_void_p()
        self._call("cudaMallocHost", ctypes.byref(pointer), max(nbytes, 1))
        address = pointer.value or 0
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(nbytes, 1)).from_address(address))

    def zero(self, address: int, nbytes: int) -> None:
        if nbytes:
            self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        """`source` must be contiguous, pinned, and left alone until the copy is done."""
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, _TO_DEVICE, self.stream)

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, _TO_HOST, self.stream)

    def copy_box(self, target: Box, source: Box, width: int) -> None:
        """The first `width` bytes of each line, on the device. Both boxes have the same slices and lines."""
        if width and source.lines and source.slices:
            parameters = Copy3D(
                source=_pitched(source, width),
                target=_pitched(target, width),
                extent=Extent(width, source.lines, source.slices),
                kind=_ON_DEVICE,
            )
            self._call("cudaMemcpy3DAsync", ctypes.byref(parameters), self.stream)

    def zero_box(self, target: Box, width: int) -> None:
        """The first `width` bytes of each line become zero."""
        if width and target.lines and target.slices:
            extent = Extent(width, target.lines, target.slices)
            self._call("cudaMemset3DAsync", _pitched(target, width), 0, extent, self.stream)

    def wait(self) -> None:
        """Until everything on the stream is done. Errors of kernels that ran since come up here."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], bool]) -> int | None:
        """A graph of what `work` puts on the stream, which is not run; None where `work` or CUDA refuses to record it.

        Raises what `work` raises. The stream is as before in any case.
        """
        if self._library.cudaStreamBeginCapture(self.stream, _THREAD_LOCAL):
            self._library.cudaGetLastError()
            return None
        recorded, graph, launchable = False, c_void_p(), c_void_p()
        try:
            recorded = work()
        finally:
            status = self._library.cudaStreamEndCapture(self.stream, ctypes.byref(graph))
            if not status and recorded:
                status = self._library.cudaGraphInstantiateWithFlags(ctypes.byref(launchable), graph, 0)
            if graph.value:  # also where the capture was spoilt half-way
                self._library.cudaGraphDestroy(graph)
            if status:
                self._library.cudaGetLastError()  # a refused capture is not an error of the next call
        if status or not recorded:
            return None
        made = launchable.value or 0
        self._graphs.add(made)
        return made

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def drop(self, graph: int) -> None:
        """The graph must not be running."""
        self._graphs.discard(graph)
        self._call("cudaGraphExecDestroy", graph)

    def usable(self) -> bool:
        """Whether calls succeed again: an error on the device comes back from each of them, any other just once."""
        self._library.cudaGetLastError()
        return not self._library.cudaStreamSynchronize(self.stream)

    def close(self) -> None:
        """Gives everything back, as far as a device that failed still takes it. May be called twice."""
        if not self.stream:
            return
        self._library.cudaStreamSynchronize(self.stream)
        for name, taken in (
            ("cudaGraphExecDestroy", self._graphs),
            ("cudaFreeHost", self._pinned),
            ("cudaFree", self._device_memory),
        ):
            for address in taken:
                getattr(self._library, name)(address)
            taken.clear()
        self._library.cudaStreamDestroy(self.stream)
        self.stream = 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()
            reason = self._library.cudaGetErrorString(status).decode(errors="replace")
            raise ServerFault(f"{name} failed: CUDA error {status}, {reason}")


def pin_device(device: int) -> None:
    """This process sees GPU `device` alone, as its number 0 in every thread. Before CUDA wakes up.

    `device` counts the GPUs that CUDA_VISIBLE_DEVICES shows. Raises BadEnvironment where it shows fewer.
    cudaSetDevice would not do: it holds for the thread that calls it, and steps run on another.
    """
    named = named_devices()
    if named is not None and device >= len(named):
        raise BadEnvironment(
            f"GPU {device} of this process: CUDA_VISIBLE_DEVICES shows {len(named)} ({', '.join(named) or 'none'}); "
            "name more there, or use a lower number"
        )
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device) if named is None else named[device]


def load_runtime() -> Any:
    """libcudart with its signatures. Raises BadEnvironment where there is none."""
    library = load_shared("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
    library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (c_int,), c_char_p
    return library


def load_shared(*names: str) -> ctypes.CDLL:
    """The first of these that loads: from the loader's path, NVIDIA's Python packages, or /usr/local/cuda."""
    for name in names:
        for file in (name, *_installed(name)):
            try:
                # Global: who asks the loader for the same name later, as TensorRT does for NCCL, gets this one.
                return ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
    raise BadEnvironment(
        f"none of {', '.join(names)} loads; install NVIDIA's package of it, or add its folder to LD_LIBRARY_PATH"
    )


def _installed(name: str) -> Iterator[str]:
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{name}")))
    yield f"/usr/local/cuda/lib64/{name}"


def _pitched(box: Box, width: int) -> PitchedPointer:
    return PitchedPointer(box.address, box.pitch, width, box.slice_lines)
