"""A CUDA runtime whose device is host memory, behind the same ctypes signatures.

It is lazy, as a GPU is at worst: nothing on the stream happens before somebody waits, so memory that is changed or
given back too early shows. (`eager` where a peer waits, too.) It checks every address and size, fills fresh memory with
NaNs, and counts what is taken.
"""

# ruff: noqa: N802 - methods have the names of what they stand in for

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.tensorrt.cuda import SIGNATURES

Work = Callable[[], None]
OUT_OF_MEMORY, INVALID_VALUE, ILLEGAL_ADDRESS, INVALIDATED = 2, 1, 700, 901
_ALIGNMENT = 256


class StandIn:
    """`library` is what `Cuda` takes. `faults` holds what a GPU would have punished; it must stay empty."""

    def __init__(self, *, eager: bool = False) -> None:
        self._eager = eager
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.captured = 0
        self.refuses_capture = self.broken = False
        self.fails: tuple[str, int] | None = None  # a call and after how many of them
        self._memory: dict[str, dict[int, NDArray[np.uint8]]] = {"device": {}, "pinned": {}}
        self._queue: list[Work] = []
        self._graphs: dict[int, list[Work]] = {}
        self._streams: set[int] = set()
        self._capturing: list[Work] | None = None
        self._handles = iter(range(1, 1 << 30))
        named = {name: self._function(name, types) for name, types in SIGNATURES.items()}
        self.library = SimpleNamespace(**named, cudaGetErrorString=lambda status: b"a fault")

    @property
    def taken(self) -> int:
        """Allocations, graphs and streams that were not given back."""
        return sum(map(len, self._memory.values())) + len(self._graphs) + len(self._streams)

    @property
    def graphs(self) -> int:
        """That can be launched."""
        return len(self._graphs)

    @property
    def is_capturing(self) -> bool:
        return self._capturing is not None

    def submit(self, work: Work) -> None:
        """Onto the stream, or into the graph that is being captured."""
        if self._capturing is not None:
            self._capturing.append(work)
        elif self._eager:
            work()
        else:
            self._queue.append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Device memory as an array, for what computes on it."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._bytes(address, nbytes, "device").view(dtype).reshape(shape)

    def poison(self) -> None:
        """NaNs in all device memory, as a kernel that went astray may leave them."""
        for block in self._memory["device"].values():
            block.fill(0xFF)

    def _bytes(self, address: int, nbytes: int, kind: str) -> NDArray[np.uint8]:
        for start, block in self._memory[kind].items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start :][:nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not {kind} memory")

    def _function(self, name: str, types: tuple[Any, ...]) -> Any:
        method = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            if self.fails is not None and self.fails == (name, self.calls[name]):
                return OUT_OF_MEMORY
            if self.broken:
                return ILLEGAL_ADDRESS
            try:
                return method(*arguments) or 0
            except Exception as error:  # noqa: BLE001 - ctypes would print it and go on
                self.faults.append(f"{name}: {error}")
                return INVALID_VALUE

        return CFUNCTYPE(c_int, *types)(call)

    def _take(self, kind: str, pointer: Any, nbytes: int) -> None:
        assert not self.is_capturing, "memory taken while capturing"
        block = np.full(nbytes + _ALIGNMENT, 0xFF, np.uint8)
        skip = -block.ctypes.data % _ALIGNMENT
        pointer[0] = block.ctypes.data + skip
        self._memory[kind][pointer[0]] = block[skip : skip + nbytes]

    def _give(self, kind: str, address: int) -> None:
        assert not self._queue, "memory given back while work waits on the stream"
        del self._memory[kind][address]

    def _cudaMalloc(self, pointer: Any, nbytes: int) -> None:
        self._take("device", pointer, nbytes)

    def _cudaMallocHost(self, pointer: Any, nbytes: int) -> None:
        self._take("pinned", pointer, nbytes)

    def _cudaFree(self, address: int) -> None:
        self._give("device", address)

    def _cudaFreeHost(self, address: int) -> None:
        self._give("pinned", address)

    def _cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> None:
        target = self._on(stream)._bytes(address, nbytes, "device")
        self.submit(lambda: target.fill(value))

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        kinds = {1: ("device", "pinned"), 2: ("pinned", "device"), 3: ("device", "device")}[kind]
        to, origin = (self._on(stream)._bytes(at, nbytes, of) for at, of in zip((target, source), kinds, strict=True))
        self.submit(lambda: np.copyto(to, origin))

    def _cudaMemset3DAsync(self, target: Any, value: int, extent: Any, stream: int) -> None:
        lines = self._on(stream)._lines(target, extent)
        self.submit(lambda: [line.fill(value) for line in lines] and None)

    def _cudaMemcpy3DAsync(self, parameters: Any, stream: int) -> None:
        asked = parameters.contents
        assert asked.kind == 3
        assert (asked.source_array, asked.target_array) == (None, None)
        source, target = (self._on(stream)._lines(end, asked.extent) for end in (asked.source, asked.target))
        self.submit(lambda: [np.copyto(a, b) for a, b in zip(target, source, strict=True)] and None)

    def _lines(self, start: Any, extent: Any) -> list[NDArray[np.uint8]]:
        assert extent.width <= start.pitch, "lines overlap"
        assert extent.height <= start.ysize, "slices overlap"
        return [
            self._bytes(start.ptr + (at * start.ysize + line) * start.pitch, extent.width, "device")
            for at in range(extent.depth)
            for line in range(extent.height)
        ]

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> None:
        assert flags == 1, "graphs want a stream that does not wait for the default one"
        pointer[0] = next(self._handles)
        self._streams.add(pointer[0])

    def _cudaStreamDestroy(self, stream: int) -> None:
        self._streams.remove(stream)

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert not self._on(stream).is_capturing, "waited while capturing"
        while self._queue:
            self._queue.pop(0)()

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert not self._on(stream).is_capturing
        assert mode == 1
        self._capturing = []

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> int:
        work, self._capturing = self._on(stream)._capturing, None
        if self.refuses_capture:
            return INVALIDATED
        assert work is not None
        pointer[0] = next(self._handles) * 2 + 1  # odd: not launchable yet
        self._graphs[pointer[0]] = work
        return 0

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: int, flags: int) -> None:
        assert flags == 0
        pointer[0] = next(self._handles) * 2
        self._graphs[pointer[0]] = self._graphs[graph]
        self.captured += 1

    def _cudaGraphDestroy(self, graph: int) -> None:
        assert graph % 2
        del self._graphs[graph]

    def _cudaGraphLaunch(self, graph: int, stream: int) -> None:
        assert graph % 2 == 0
        assert not self._on(stream).is_capturing
        for work in self._graphs[graph]:
            self.submit(work)

    def _cudaGraphExecDestroy(self, graph: int) -> None:
        assert graph % 2 == 0
        assert not any(work in self._queue for work in self._graphs[graph]), "a graph ends while it runs"
        del self._graphs[graph]

    def _cudaGetLastError(self) -> None:
        """Forgets an error that is not the device's."""

    def _on(self, stream: int) -> StandIn:
        assert stream in self._streams, "no such stream"
        return self
