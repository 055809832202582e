"""TensorRT, both flavours, through Polygraphy's CUDA wrapper. **Not run yet**: written on a machine without a GPU.

An engine has a cache of fixed capacity, so there is one for each pool ("sm89.512"). Each has two profiles: prompts,
one row of up to `chunk_tokens`, and decoding, up to `slots` rows of one token. Cache inputs and outputs have the same
address, as TensorRT's cache update demands. Tokens and logits go through pinned memory. There is no CUDA graph: rows
come and go with every step, and a graph for each number of rows has to be captured and kept. Encoder-decoders and
ranks do not run here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment, ServerFault
from runtime.generation.executor import Batch, Copy, Logits, Row, Tokens
from runtime.gpu import visible_targets

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind


class _Memory:
    """CUDA calls that are needed here. Raises ServerFault for any that fails."""

    def __init__(self) -> None:
        from polygraphy import cuda

        self._library = cuda.wrapper().handle
        self.stream: int = cuda.wrapper().create_stream()

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise ServerFault(f"{name} failed with CUDA error {status}")

    def device(self, nbytes: int) -> int:
        """Zeroed: a masked position that holds a NaN would still spoil a sum."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        self.call("cudaMemset", pointer, 0, ctypes.c_size_t(nbytes))
        return pointer.value or 0

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = ctypes.c_void_p()
        self.call("cudaMallocHost", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        buffer = (ctypes.c_char * nbytes).from_address(pointer.value or 0)
        return np.ndarray(shape, dtype, memoryview(buffer))

    def copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self.call("cudaMemcpyAsync", _pointer(target), _pointer(source), ctypes.c_size_t(nbytes), kind, self._on())

    def copy_heads(self, target: int, pitch: int, source: int, source_pitch: int, width: int, heads: int) -> None:
        """The first `width` bytes of each head; heads lie a pitch apart, in bytes."""
        sizes = [ctypes.c_size_t(size) for size in (pitch, source_pitch, width, heads)]
        self.call("cudaMemcpy2DAsync", _pointer(target), sizes[0], _pointer(source), *sizes[1:], _ON_DEVICE, self._on())

    def zero_heads(self, target: int, pitch: int, width: int, heads: int) -> None:
        sizes = [ctypes.c_size_t(size) for size in (pitch, width, heads)]
        self.call("cudaMemset2DAsync", _pointer(target), sizes[0], 0, *sizes[1:], self._on())

    def wait(self) -> None:
        self.call("cudaStreamSynchronize", self._on())

    def _on(self) -> ctypes.c_void_p:
        return _pointer(self.stream)


class _Pool:
    """The engine of one capacity, with a context for each profile, and its caches on the device."""

    def __init__(self, engine: Any, rows: int, memory: _Memory) -> None:
        self.engine, self._memory = engine, memory
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.shapes = {
            name: tuple(engine.get_tensor_shape(name)) for name in names if name.startswith(("key_", "value_"))
        }
        self.items = {name: int(engine.get_tensor_dtype(name).itemsize) for name in self.shapes}
        self.caches = {name: memory.device(rows * self.row_bytes(name)) for name in self.shapes}
        self._contexts = [engine.create_execution_context() for _ in range(engine.num_optimization_profiles)]
        for index, context in enumerate(self._contexts):
            context.set_optimization_profile_async(index, memory.stream)
        memory.wait()

    def row_bytes(self, name: str) -> int:
        return int(np.prod(self.shapes[name][1:])) * self.items[name]

    def pitch(self, name: str) -> int:
        """Bytes of one head."""
        return int(np.prod(self.shapes[name][2:])) * self.items[name]

    def run(self, inputs: Mapping[str, tuple[int, tuple[int, ...]]], logits: int, first: int, rows: int) -> None:
        context = self._context(inputs["input_ids"][1])
        for name, (address, shape) in inputs.items():
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, address)
        for name, base in self.caches.items():
            address = base + first * self.row_bytes(name)
            context.set_input_shape(name, (rows, *self.shapes[name][1:]))
            context.set_tensor_address(name, address)
            context.set_tensor_address(f"new_{name}", address)
        context.set_tensor_address("logits", logits)
        if not context.execute_async_v3(self._memory.stream):
            raise ServerFault("TensorRT did not run the step")

    def _context(self, shape: tuple[int, ...]) -> Any:
        """The first profile that takes `input_ids` of this shape."""
        for index, context in enumerate(self._contexts):
            low, _, high = self.engine.get_tensor_profile_shape("input_ids", index)
            if all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return context
        raise ServerFault(f"no profile of the engine takes input_ids of shape {list(shape)}")


class TensorRtStepExecutor:
    """`engines` by target and capacity (`{"sm89.512": path, ...}`), of one flavour. Raises BadEnvironment."""

    stages = 1

    def __init__(
        self,
        engines: Mapping[str, Path],
        capacities: Sequence[int],
        rows: int,
        *,
        flavour: Literal["tensorrt", "tensorrt-rtx"],
        device: int,
    ) -> None:
        target = dict(enumerate(visible_targets())).get(device)
        wanted = [f"{target}.{capacity}" for capacity in capacities]
        missing = [name for name in wanted if name not in engines]
        if missing:
            raise BadEnvironment(
                f"GPU {device} of this machine: {target or 'none'}; no engine for {', '.join(missing)}, only for "
                f"{', '.join(sorted(engines))}; add the target to engine.targets and build again"
            )
        if flavour == "tensorrt-rtx":
            os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        # Each instance is a process of its own, so this pins it; it must come before CUDA wakes up.
        os.environ["CUDA_DEVICE_ORDER"], os.environ["CUDA_VISIBLE_DEVICES"] = "PCI_BUS_ID", str(device)
        from polygraphy.backend.common import bytes_from_path
        from polygraphy.backend.trt import engine_from_bytes

        loaded = [engine_from_bytes(bytes_from_path(str(engines[name]))) for name in wanted]
        self._memory = _Memory()
        self._pools = [_Pool(engine, rows, self._memory) for engine in loaded]
        self.vocabulary = int(loaded[0].get_tensor_shape("logits")[-1])
        pool = self._pools[0]
        position_bytes = sum(pool.row_bytes(name) // pool.shapes[name][2] for name in pool.shapes)
        self.call_cost = engines[wanted[0]].stat().st_size // position_bytes
        longest = max(capacities)
        self._tokens = self._memory.pinned((max(rows, longest) + 2 * rows,), np.int64)
        self._device_tokens = self._memory.device(self._tokens.nbytes)
        self._logits = [self._memory.pinned((rows, self.vocabulary), np.float32) for _ in capacities]
        self._device_logits = self._memory.device(self._logits[0].nbytes)

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Batch) -> Logits:
        rows, length = batch.input_ids.shape
        last = np.full(rows, length - 1, np.int64)
        joined = np.concatenate([batch.input_ids.ravel(), batch.write_indices, last])
        self._tokens[: len(joined)] = joined
        self._memory.copy(self._device_tokens, self._tokens.ctypes.data, joined.nbytes, _TO_DEVICE)
        after = self._device_tokens + 8 * rows * length
        inputs = {
            "input_ids": (self._device_tokens, (rows, length)),
            "write_indices": (after, (rows,)),
            "last_index": (after + 8 * rows, (rows,)),
        }
        self._pools[batch.pool].run(inputs, self._device_logits, batch.first, rows)
        logits: Logits = self._logits[batch.pool][batch.first : batch.first + rows]
        self._memory.copy(logits.ctypes.data, self._device_logits, logits.nbytes, _TO_HOST)
        self._memory.wait()
        return logits

    def copy(self, copies: Sequence[Copy]) -> None:
        """On the stream of the steps, so it is done before the next one reads."""
        for source, target, tokens in copies:
            pool = self._pools[target.pool]
            for name, (_, heads, _, head_dim) in pool.shapes.items():
                pitch, filled = pool.pitch(name), tokens * head_dim * pool.items[name]
                row = pool.caches[name] + target.place * pool.row_bytes(name)
                if source is not None:
                    origin = self._pools[source.pool]
                    start = origin.caches[name] + source.place * origin.row_bytes(name)
                    self._memory.copy_heads(row, pitch, start, origin.pitch(name), filled, heads)
                self._memory.zero_heads(row + filled, pitch, pitch - filled, heads)

    def encode(self, row: Row, source: Tokens) -> None:
        raise ServerFault("encoder-decoders do not run on TensorRT here")

    def lost(self) -> bool:
        return False

    def reset(self) -> None:
        """A CUDA fault spoils the process for good; anything else leaves memory that steps write over."""
        self._memory.wait()

    def close(self) -> None:
        self._memory.wait()  # the process ends with its model, and gives everything back


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
