"""Encoders as TensorRT engines: built as users build them, compared with ONNX Runtime, timed over the grid.

Without a GPU the engine is built all the same, ahead of time, and the graph that it was built from stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.artifacts import Engine, OnnxGraph
from builders.errors import ParityError, QualityError
from builders.judging import corpus, vectors
from builders.pipeline import Build
from builders.spec import Flavour
from measure.gpu_proof.encoders import timed_grid
from measure.gpu_proof.folders import encoder_spec, weights_note
from measure.gpu_proof.machine import try_flavour
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import EncoderShape, Limits
from measure.gpu_proof.setting import Budget, Setting
from runtime.session import open_session
from runtime.tensorrt.executor import load_engines

LEAST_COSINE = {"fp16": 0.999, "int8": 0.98}  # of the worst text to the fp32 graph
_TEXTS = 64


def measure(setting: Setting, limits: Limits | None, budget: Budget, *, flavour: Flavour) -> Iterator[Row]:
    try_flavour(flavour, setting)
    for shape in setting.encoders:
        # Random weights have no quality that INT8 could keep or lose.
        for precision in ("fp16", "int8") if weights_note(shape) == "real weights" else ("fp16",):
            how = f"{flavour} engine, {precision}"
            try:
                built = pipeline.build(
                    encoder_spec(shape, setting, flavour, precision), "gpu", setting.scratch, "engine"
                )
            except QualityError as error:
                yield Row(f"{shape.name}, engine", how, reason=str(error))
                continue
            engine = built.engines[0]
            figures = {"build_s": engine.build_seconds, "mb": engine.bytes / 1e6, "layers": float(engine.layers)}
            unrun = "built ahead of time; not run: no GPU here" if setting.dry else ""
            yield Row(f"{shape.name}, engine", how, figures=figures, facts={"target": engine.target}, note=unrun)
            runner = open_runner(setting, engine, built.served_graph)
            how = f"{how} (stand-in: its graph on ONNX Runtime)" if setting.dry else how
            yield _compared(built, runner, shape, how, precision)
            rows = timed_grid(setting, limits, budget, shape, how, runner.call)
            yield from (replace(row, note=weights_note(shape)) for row in rows)


def _compared(built: Build, runner: EngineRunner | GraphRunner, shape: EncoderShape, how: str, precision: str) -> Row:
    """Raises ParityError for an engine that computes something else than the fp32 graph."""
    requests = vectors.sample_requests(built.checkpoint, corpus.texts(None, _TEXTS))
    reference = vectors.graph_outputs(built.graph("fp32").file_path, requests, built.checkpoint)
    outputs = np.concatenate([runner.outputs(request) for request in requests])
    found = vectors.measure(reference, outputs, "embedding", how)
    if not found.worst_cosine >= LEAST_COSINE[precision]:
        raise ParityError(
            f"{shape.name}, {how}: worst cosine to the fp32 graph {found.worst_cosine:.5f} over {found.texts} texts, "
            f"limit {LEAST_COSINE[precision]}"
        )
    figures = {"mean_cosine": found.mean_cosine, "worst_cosine": found.worst_cosine}
    return Row(f"{shape.name}, against ONNX Runtime fp32", how, figures=figures)


def open_runner(setting: Setting, engine: Engine, graph: OnnxGraph) -> EngineRunner | GraphRunner:
    names = tuple(tensor.name for tensor in graph.inputs)
    return GraphRunner(graph.file_path, names) if setting.dry else EngineRunner(engine, names)


class GraphRunner:
    """Stands in for an engine where none runs: the graph that it was built from, by ONNX Runtime on the CPU."""

    def __init__(self, graph: Path, names: tuple[str, ...]) -> None:
        self._session = open_session(graph)
        self._names = names

    def outputs(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._session.run(None, dict(feeds))[0]
        return result

    def call(self, batch: int, length: int) -> Callable[[], object]:
        feeds = {name: np.ones((batch, length), np.int64) for name in self._names}
        return lambda: self._session.run(None, feeds)


class EngineRunner:
    """An engine over torch's memory and stream, so that torch's events time it. Not thread-safe."""

    def __init__(self, engine: Engine, names: tuple[str, ...]) -> None:
        import torch

        cuda: Any = torch.cuda
        cuda.set_stream(cuda.Stream())  # TensorRT synchronises more on the default one
        _, [self._engine] = load_engines([engine.file_path], engine.flavour)
        self._context = self._engine.create_execution_context()
        self._names = names
        everything = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._output = next(name for name in everything if name not in names)

    def outputs(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        import torch

        launch, output = self._bound({name: torch.from_numpy(array).cuda() for name, array in feeds.items()})
        launch()
        result: NDArray[np.float32] = output.cpu().numpy()
        return result

    def call(self, batch: int, length: int) -> Callable[[], object]:
        import torch

        return self._bound({name: torch.ones(batch, length, dtype=torch.int64).cuda() for name in self._names})[0]

    def _bound(self, feeds: Mapping[str, Any]) -> tuple[Callable[[], object], Any]:
        """What launches the engine on these tensors, and where its output will lie; it keeps the tensors alive."""
        import torch

        for name, tensor in feeds.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        output = torch.empty(tuple(self._context.get_tensor_shape(self._output)), dtype=torch.float32, device="cuda")
        self._context.set_tensor_address(self._output, output.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream

        def launch(kept: object = (feeds, output)) -> None:
            if not self._context.execute_async_v3(stream):
                raise ParityError("TensorRT did not run the engine")

        return launch, output
