"""One TensorRT engine on the device: its contexts, its graphs and its caches. **Not run on a GPU yet.**

A context whose bindings changed must not run a graph that was captured from it before, and a graph holds the addresses
that it was captured with. So a decode shape that comes back gets a context of its own, bound once; everything else
shares one context for each profile. Only batches from row 0 on count as coming back: of these there are as many shapes
as slots, whereas single tokens of prompts, and later parts of a pipeline's step, begin anywhere. Contexts are many and
run one after another, so all compute in the same scratch memory, which each would otherwise take for itself.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import BadEnvironment, ServerFault
from runtime.tensorrt.cuda import Box, Cuda

OWN, CROSS = ("key_cache_", "value_cache_"), ("cross_key_", "cross_value_")  # caches by the beginnings of their names
LOGITS, TOP = "logits", "top"  # outputs of the last stage: [rows, vocabulary], and [rows, 2] with logit and token
MOST_OWN = 64  # contexts that a pool keeps for shapes that came back, and their graphs: they take memory
ALIGNMENT = 256  # of addresses that are bound: what cudaMalloc gives, and kernels may count on


class At(NamedTuple):
    """Rows `first` … of a pool, and how many tokens of each. More than one row has one token each."""

    first: int
    rows: int
    length: int


@dataclass(frozen=True)
class Port:
    """An input or output of a stage that is no cache. `dims` are sizes, or "batch", "length" or "capacity"."""

    name: str
    dims: tuple[int | str, ...]
    itemsize: int

    def shape(self, at: At, capacity: int) -> tuple[int, ...]:
        sizes = {"batch": at.rows, "length": at.length, "capacity": capacity}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def nbytes(self, at: At, capacity: int) -> int:
        return int(np.prod(self.shape(at, capacity), dtype=np.int64)) * self.itemsize


class Launcher:
    """Makes execution contexts of either flavour, and runs them on the stream.

    TensorRT: graphs are captured here, as long as nothing refuses. TensorRT for RTX captures by itself, because it
    knows when the kernels of a shape are compiled for good; before that, a captured graph would hold others.
    """

    def __init__(self, trt: Any, cuda: Cuda, engines: Sequence[Any], communicator: Any = None) -> None:
        """`communicator` is a capsule of NCCL's, for engines with collectives."""
        self._trt, self._cuda, self._communicator = trt, cuda, communicator
        self._rtx = hasattr(trt, "CudaGraphStrategy")
        self._captures = not self._rtx
        self._kernels: Any = None  # RTX: what one context has compiled, the next need not
        size = max(int(engine.device_memory_size_v2) for engine in engines)
        self._scratch = cuda.device(size), size

    def context(self, engine: Any, profile: int, *, graphs: bool = False) -> Any:
        """Where there is a communicator, every rank that shares it must come here at the same time."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(self._rtx_config(engine, graphs) if self._rtx else strategy)
        if context is None:
            raise ServerFault("TensorRT made no execution context; its log has the reason, often a lack of GPU memory")
        context.set_device_memory(*self._scratch)
        require(context.set_optimization_profile_async(profile, self._cuda.stream), f"profile {profile}")
        if self._communicator is not None:
            require(context.set_communicator(self._communicator), "the NCCL communicator")
        return context

    def run(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise ServerFault("TensorRT did not run the step; its log has the reason")

    def capture(self, context: Any) -> int | None:
        """A graph of the context's bindings as they are. It has run with them once: that part cannot be captured."""
        if not self._captures:
            return None
        graph = self._cuda.capture(lambda: bool(context.execute_async_v3(self._cuda.stream)))
        if graph is None:
            self._captures = False
            print("tensorrt: CUDA graphs are refused; steps are launched kernel by kernel", file=sys.stderr, flush=True)
        return graph

    def _rtx_config(self, engine: Any, graphs: bool) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategy = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if graphs else strategy.DISABLED
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
        config.set_runtime_cache(self._kernels)
        return config


@dataclass
class _Own:
    """The context of one decode shape, bound for good, and the graph that was captured from it."""

    context: Any
    graph: int | None


class EnginePool:
    """The engine of one capacity with the caches of `rows` sequences.

    `ports` are its inputs beside the caches; `addresses` are those of everything that has one place for all calls.
    Raises BadEnvironment for an engine of another making.
    """

    def __init__(
        self,
        engine: Any,
        capacity: int,
        rows: int,
        cuda: Cuda,
        launcher: Launcher,
        ports: Sequence[Port],
        addresses: Mapping[str, int],
    ) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.capacity = capacity
        self._engine, self._rows, self._cuda, self._launcher = engine, rows, cuda, launcher
        self._ports = [port for port in ports if port.name in names]
        self._addresses = {name: address for name, address in addresses.items() if name in names}
        self._own_caches = [name for name in names if name.startswith(OWN)]
        self.cross = [name for name in names if name.startswith(CROSS)]  # of encoder-decoders; they are only read
        self._caches = [*self._own_caches, *self.cross]
        self.heads, self._head_dim, self.line = self._cache_layout()
        self.position_bytes = self.line * self.heads * len(self._caches)
        self._row_bytes = self.heads * capacity * self.line
        self.vocabulary = int(engine.get_tensor_shape(LOGITS)[-1]) if LOGITS in names else 0
        self._logits_pitch = -(-self.vocabulary * 4 // ALIGNMENT) * ALIGNMENT
        self._require_io(names)
        self._memory = cuda.device(self._bytes)
        self._logits = cuda.device(rows * self._logits_pitch)
        self._shared = [launcher.context(engine, index) for index in range(engine.num_optimization_profiles)]
        self._own: OrderedDict[int, _Own] = OrderedDict()  # by rows, from row 0 on; the last used last
        self._seen: set[int] = set()

    @property
    def _bytes(self) -> int:
        return len(self._caches) * self._rows * self._row_bytes

    def run(self, at: At) -> None:
        """Puts one call on the stream."""
        comes_back = at.first == 0 and at.length == 1
        if not comes_back or at.rows not in self._seen:
            if comes_back:
                self._seen.add(at.rows)
            context = self._shared[self._profile(at)]
            self._bind(context, at)
            self._launcher.run(context)
        elif at.rows not in self._own:
            self._own[at.rows] = self._bind_own(at)
        else:
            self._own.move_to_end(at.rows)
            own = self._own[at.rows]
            if own.graph is None:
                self._launcher.run(own.context)
            else:
                self._cuda.launch(own.graph)

    def row(self, place: int, *, of: tuple[str, str], skip: int = 0) -> Box:
        """Row `place` of the caches OWN or CROSS, from position `skip` on: a line is one head."""
        before, slices = (0, len(self._own_caches)) if of is OWN else (len(self._own_caches), len(self.cross))
        start = self._memory + (before * self._rows + place) * self._row_bytes + skip * self.line
        return Box(start, self.capacity * self.line, self._rows * self.heads, slices, self.heads)

    def fill(self, place: int, source: tuple[EnginePool, int] | None, tokens: int) -> None:
        """The first `tokens` positions of row `place` from another row, zeros behind them. CROSS comes as a whole."""
        for kind in (OWN, CROSS):
            length = 0
            if source is not None:
                origin, row = source
                length = tokens if kind is OWN else min(self.capacity, origin.capacity)
                if (origin, row) != (self, place):  # a copy onto itself is not defined
                    self._cuda.copy_box(self.row(place, of=kind), origin.row(row, of=kind), length * self.line)
            self._cuda.zero_box(self.row(place, of=kind, skip=length), (self.capacity - length) * self.line)

    def logits(self, first: int, row: int = 0) -> int:
        """Where the logits of row `first + row` lie, of a call that began at row `first`. No other call's are there."""
        return self._logits + first * self._logits_pitch + row * self.vocabulary * 4

    def reset(self) -> None:
        """Empty caches, and no context that a failed call may have left half-way."""
        self._cuda.zero(self._memory, self._bytes)
        while self._own:
            self._forget_oldest()

    def close(self) -> None:
        """Ends the contexts, then the engine; memory is the owner's of `cuda`. Nothing may run any more."""
        self._own.clear()
        self._shared.clear()
        self._engine = None

    def _bind_own(self, at: At) -> _Own:
        """Runs the call on a context of its own, which gets the shapes settled, and captures it for the next time."""
        if len(self._own) >= MOST_OWN:
            self._cuda.wait()  # it may be running
            self._forget_oldest()
        context = self._launcher.context(self._engine, self._profile(at), graphs=True)
        self._bind(context, at)
        self._launcher.run(context)
        return _Own(context, self._launcher.capture(context))

    def _forget_oldest(self) -> None:
        rows, own = self._own.popitem(last=False)
        self._seen.discard(rows)  # it must come back again: a capture costs more than many plain steps
        if own.graph is not None:
            self._cuda.drop(own.graph)

    def _bind(self, context: Any, at: At) -> None:
        for port in self._ports:
            shape = port.shape(at, self.capacity)
            require(context.set_input_shape(port.name, shape), f"{port.name} of shape {list(shape)}")
        for name, address in self._addresses.items():
            bind_address(context, name, address)
        for number, name in enumerate(self._caches):
            shape = (at.rows, self.heads, self.capacity, self._head_dim)
            address = self._memory + (number * self._rows + at.first) * self._row_bytes
            require(context.set_input_shape(name, shape), f"{name} of shape {list(shape)}")
            bind_address(context, name, address)
            if number < len(self._own_caches):
                bind_address(context, f"new_{name}", address)  # the cache update works in place
        if self.vocabulary:
            bind_address(context, LOGITS, self.logits(at.first))

    def _cache_layout(self) -> tuple[int, int, int]:
        """Heads, head_dim and bytes of one position of one head: the same for every cache, so that a row is one box."""
        layouts = set()
        for name in self._caches:
            _, heads, capacity, head_dim = self._engine.get_tensor_shape(name)
            if capacity != self.capacity:
                raise BadEnvironment(f"{name} of the engine has {capacity} positions, its pool {self.capacity}")
            layouts.add((heads, head_dim, head_dim * int(self._engine.get_tensor_dtype(name).itemsize)))
        if len(layouts) > 1:
            raise BadEnvironment(f"caches of {sorted(layouts)} (heads, head_dim, bytes); all must be of one shape")
        return layouts.pop() if layouts else (0, 0, 0)

    def _require_io(self, names: Sequence[str]) -> None:
        known = {*self._addresses, *self._caches, *(f"new_{name}" for name in self._own_caches), LOGITS}
        unknown = sorted(set(names) - known)
        if unknown or (LOGITS in names and TOP not in names):
            wrong = f"the unknown {', '.join(unknown)}" if unknown else f"logits and no {TOP}"
            raise BadEnvironment(f"the engine has {wrong}: not of this release; run `trireme build` again")
        if self._row_bytes % ALIGNMENT:
            raise BadEnvironment(
                f"a row of a cache takes {self._row_bytes} bytes, no multiple of {ALIGNMENT}; "
                "choose cache lengths that are multiples of 128"
            )

    def _profile(self, at: At) -> int:
        """The first profile that takes this shape."""
        for index in range(self._engine.num_optimization_profiles):
            limits = [self._engine.get_tensor_profile_shape(port.name, index) for port in self._ports]
            shapes = [port.shape(at, self.capacity) for port in self._ports]
            if all(
                low <= size <= high
                for shape, (lows, _, highs) in zip(shapes, limits, strict=True)
                for low, size, high in zip(lows, shape, highs, strict=True)
            ):
                return index
        raise ServerFault(f"no profile of the engine takes {at.rows} rows of {at.length} tokens")


def require(accepted: bool, what: str) -> None:
    """Raises ServerFault for what TensorRT answers False to."""
    if not accepted:
        raise ServerFault(f"TensorRT refuses {what}; its log has the reason")


def bind_address(context: Any, name: str, address: int) -> None:
    require(context.set_tensor_address(name, address), f"an address for {name}")
