"""TensorRT's engines and contexts over ONNX Runtime, on the memory of a CUDA stand-in.

Contexts are as strict as TensorRT's documentation: a graph may be captured only after a run with the same shapes, and
must not be launched once its context was changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.session import open_session
from runtime.tensorrt import executor
from tests.tensorrt.cuda_stand_in import StandIn

TARGET = "sm89"
SLOTS, CHUNK = 4, 16  # what the stand-in engines' profiles take
_STRATEGY = SimpleNamespace(USER_MANAGED="user")
MODULES = {
    "tensorrt": SimpleNamespace(ExecutionContextAllocationStrategy=_STRATEGY),
    "tensorrt-rtx": SimpleNamespace(
        ExecutionContextAllocationStrategy=_STRATEGY,
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="none"),
    ),
}
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
Arrays = Mapping[str, NDArray[Any]]


class Tensor(NamedTuple):
    """Dynamic dimensions are -1."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Model(Protocol):
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def run(self, feeds: Arrays, communicator: Any) -> Arrays: ...


class WholeModel:
    """A decoder's graph."""

    def __init__(self, graph: Path) -> None:
        self._session = open_session(graph, threads=1)
        self.inputs = {item.name: _tensor(item) for item in self._session.get_inputs()}
        self.outputs = {item.name: _tensor(item) for item in self._session.get_outputs()}

    def run(self, feeds: Arrays, communicator: Any) -> Arrays:
        assert communicator is None
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))


def _tensor(item: Any) -> Tensor:
    return Tensor(tuple(size if isinstance(size, int) else -1 for size in item.shape), np.dtype(_TYPES[item.type]))


class StandInEngine:
    """A model with a cache of `capacity` positions. `profiles` are the most rows and tokens of each."""

    device_memory_size_v2 = 4096

    def __init__(
        self, model: Model, cuda: StandIn, capacity: int, profiles: Sequence[tuple[int, int]] = ((SLOTS, 1), (1, CHUNK))
    ) -> None:
        self.model, self.cuda, self.capacity, self._profiles = model, cuda, capacity, profiles
        self.num_optimization_profiles = len(profiles)
        self.tensors = {**model.inputs, **model.outputs}
        if "logits" in model.outputs:
            self.tensors["top"] = Tensor((-1, 2), np.dtype(np.float32))
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors[name].shape
        return (*shape[:2], self.capacity, *shape[3:]) if is_cache(name) else shape

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shape = self.tensors[name].shape
        return [
            (*most, *shape[2:])[: len(shape)] for most in ((1, 1), self._profiles[profile], self._profiles[profile])
        ]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=object,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, given: Any) -> StandInContext:
        assert given == "user" or given.cuda_graph_strategy in ("whole", "none")
        self.contexts += 1
        return StandInContext(self)


def is_cache(name: str) -> bool:
    """Of fixed length, whether the graph changes it or, as the cross attention's, only reads it."""
    return "_cache_" in name or name.startswith("cross_")


class StandInContext:
    def __init__(self, engine: StandInEngine) -> None:
        self._engine, self._cuda = engine, engine.cuda
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._settled: dict[str, tuple[int, ...]] = {}
        self._version = 0
        self._communicator: Any = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._scratch = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_communicator(self, communicator: Any) -> bool:
        self._communicator = communicator
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._version += 1
        self._shapes[name] = shape
        if is_cache(name):
            return shape[1:] == self._engine.get_tensor_shape(name)[1:]
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._version += 1
        self._addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        if self._cuda.is_capturing and self._settled != self._shapes:
            return False
        self._settled = dict(self._shapes)
        engine, at, shapes = self._engine, dict(self._addresses), dict(self._shapes)
        assert set(at) == set(engine.names), "a tensor has no address"
        assert set(shapes) == set(engine.model.inputs), "an input has no shape"
        for name in shapes:
            assert f"new_{name}" not in at or at[name] == at[f"new_{name}"], "caches change in place"
        version = self._version if self._cuda.is_capturing else None
        self._cuda.submit(lambda: self._compute(shapes, at, version))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], at: dict[str, int], version: int | None) -> None:
        assert version in (None, self._version), "a graph is launched whose context was changed"
        model, cuda = self._engine.model, self._cuda
        cuda.array(self._scratch[0], (self._scratch[1],), np.uint8).fill(0xFF)
        feeds = {name: cuda.array(at[name], shapes[name], model.inputs[name].dtype).copy() for name in model.inputs}
        for name, value in model.run(feeds, self._communicator).items():
            cuda.array(at[name], value.shape, value.dtype)[:] = value
            if name == "logits":
                rows = value.reshape(len(value), -1)
                top = np.stack([rows.max(axis=1), rows.argmax(axis=1).astype(np.float32)], axis=1)
                cuda.array(at["top"], top.shape, np.float32)[:] = top


@contextmanager
def standing_in(
    graph: Path, capacities: Sequence[int], flavour: executor.Flavour = "tensorrt", encoder: Path | None = None
) -> Iterator[tuple[StandIn, dict[str, Path]]]:
    """Within, `TensorRtStepExecutor` finds a GPU that is none, and engines that are the graph. Yields these engines."""
    cuda, model = StandIn(), WholeModel(graph)
    engines = [StandInEngine(model, cuda, capacity) for capacity in capacities]
    files = {f"{TARGET}.{capacity}": graph for capacity in capacities}
    if encoder is not None:
        engines.append(StandInEngine(WholeModel(encoder), cuda, -1, [(1, max(capacities))]))
        files[f"{TARGET}.encoder"] = encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "visible_targets", lambda: [TARGET])
        patch.setattr(executor, "pin_device", lambda device: None)
        patch.setattr(executor, "load_runtime", lambda: cuda.library)
        patch.setattr(executor, "load_engines", lambda files, flavour: (MODULES[flavour], engines))
        yield cuda, files
    assert not cuda.faults
