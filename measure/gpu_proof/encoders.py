"""Encoders over a grid of batch and length: transformers' own BERT in torch, the exported graph by ONNX Runtime, and
TensorRT engines, built as users build them and compared with ONNX Runtime.

Weights are random but for MiniLM where its package is installed: speed does not ask what they say. Without a GPU the
engines are built all the same, ahead of time, and the graph that one was built from stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import pipeline
from builders.artifacts import Engine
from builders.errors import ParityError, QualityError
from builders.judging import corpus, vectors
from builders.pipeline import Build
from builders.spec import Flavour
from measure.gpu_proof.folders import built_row, encoder_folder, encoder_graph, encoder_spec, stand_in, weights_note
from measure.gpu_proof.llama import captured
from measure.gpu_proof.machine import require_torch, try_flavour
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import EncoderShape, against, encoder_work
from measure.gpu_proof.setting import NotRun, Setting, device_seconds, in_time
from runtime.session import open_session
from runtime.tensorrt.executor import load_engines

LEAST_COSINE = {"fp16": 0.999, "int8": 0.98}  # of the worst text to the fp32 graph
_TEXTS = 64
Call = Callable[[], object]
Feeds = Mapping[str, NDArray[Any]]


def timed_grid(
    setting: Setting, shape: EncoderShape, how: str, prepare: Callable[[int, int], Call]
) -> Iterator[Measured]:
    """A row for each size. `prepare(batch, length)` gives the call to time. Held against the limits at the setting's
    own precision, INT8 engines too.
    """

    def measured(row: Measured) -> Measured:
        batch, length = row.axes["batch"], row.axes["length"]
        seconds = device_seconds(prepare(batch, length), setting)
        work = encoder_work(shape, batch, length, setting.value_bytes)
        return against(row, work, seconds, setting.limits, sentences_per_s=batch / seconds)

    note = weights_note(shape)
    rows = (
        Measured(f"{shape.name}, batch {batch} x length {length}", how, {"batch": batch, "length": length}, note=note)
        for length, batch in product(setting.lengths, setting.batches)
    )
    return in_time(setting, ((row, measured) for row in rows))


def measure(setting: Setting) -> Iterator[Measured]:
    """In torch; the better way first."""
    torch = require_torch(setting, "transformers")
    from transformers import BertModel

    graphs = setting.device == "cuda"
    for shape, compiled in product(setting.encoders, (True, False)):
        model = BertModel.from_pretrained(encoder_folder(shape, setting), add_pooling_layer=False)
        model = model.eval().to(setting.device, getattr(torch, setting.dtype))
        if not compiled:
            yield from timed_grid(setting, shape, "torch eager", partial(_torch_call, setting, model, False))
            continue
        # Layers share what is compiled, for any batch and length: a whole model a size would take minutes.
        for layer in model.encoder.layer:
            layer.compile(backend=setting.compiler, dynamic=True)
        how = "torch.compile + CUDA graph" if graphs else "torch.compile"
        yield from timed_grid(setting, shape, how, partial(_torch_call, setting, model, graphs))


def _torch_call(setting: Setting, model: Any, graphs: bool, batch: int, length: int) -> Call:
    """Mean-pooled vectors of full texts. Without padding there is no mask, as a good server would have it."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=setting.device)

    def encode() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state.mean(1)  # type: ignore[no-any-return]

    return captured(encode)[0] if graphs else encode


def measure_onnxruntime(setting: Setting) -> Iterator[Measured]:
    """The very graph that engines are built from, by ONNX Runtime on the device."""
    for shape in setting.encoders:
        runner = GraphRunner(encoder_graph(shape, setting), setting.device)
        yield from timed_grid(setting, shape, runner.name, runner.call)


def measure_engines(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    try_flavour(flavour, setting)
    for shape, precision in product(setting.encoders, LEAST_COSINE):
        if precision == "int8" and weights_note(shape) != "real weights":
            continue  # random weights have no quality that INT8 could keep or lose
        case, how = f"{shape.name}, engine", f"{flavour} engine, {precision}"
        try:
            spec = encoder_spec(shape, setting, flavour, precision)
            built = pipeline.build(spec, "gpu", setting.scratch, "engine")
        except QualityError as error:
            yield Measured(case, how, reason=str(error))
            continue
        yield built_row(setting, built.engines[0], case, how)
        how += stand_in(setting)
        graph = built.served_graph
        names = [tensor.name for tensor in graph.inputs]
        runner = GraphRunner(graph.file_path, "cpu") if setting.dry else EngineRunner(built.engines[0], names)
        yield _compared(built, runner.outputs, shape, how, LEAST_COSINE[precision])
        yield from timed_grid(setting, shape, how, runner.call)


def _compared(
    built: Build, outputs_of: Callable[[Feeds], NDArray[np.float32]], shape: EncoderShape, how: str, least: float
) -> Measured:
    """Raises ParityError for an engine that computes something else than the fp32 graph."""
    requests = vectors.sample_requests(built.checkpoint, corpus.texts(None, _TEXTS))
    reference = vectors.graph_outputs(built.graph("fp32").file_path, requests, built.checkpoint)
    found = vectors.measure(reference, np.concatenate([outputs_of(each) for each in requests]), "embedding", how)
    if not found.worst_cosine >= least:
        raise ParityError(
            f"{shape.name}, {how}: worst cosine to the fp32 graph {found.worst_cosine:.5f} over {found.texts} texts, "
            f"limit {least}"
        )
    figures = {"mean_cosine": found.mean_cosine, "worst_cosine": found.worst_cosine}
    return Measured(f"{shape.name}, against ONNX Runtime fp32", how, figures=figures)


class GraphRunner:
    """A graph by ONNX Runtime on the device, where inputs and outputs lie already. Raises NotRun where it has none."""

    def __init__(self, file: Path, device: str) -> None:
        import onnxruntime

        kind, self._device = "CUDA" if device == "cuda" else "CPU", device
        self.name, provider = f"ONNX Runtime {kind}", f"{kind}ExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise NotRun(f"this onnxruntime {onnxruntime.__version__} has no {provider}: install onnxruntime-gpu")
        if device == "cpu":
            self._session = open_session(file, threads=1)
        else:
            self._session = onnxruntime.InferenceSession(str(file), providers=[provider])
        if self._session.get_providers()[0] != provider:
            raise NotRun(f"{provider} does not start here: its libraries are missing or of another release")

    def outputs(self, feeds: Feeds) -> NDArray[np.float32]:
        result: NDArray[np.float32] = self._session.run(None, dict(feeds))[0]
        return result

    def call(self, batch: int, length: int) -> Call:
        import onnxruntime

        binding = self._session.io_binding()
        ones = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((batch, length), np.int64), self._device, 0)
        for item in self._session.get_inputs():
            binding.bind_ortvalue_input(item.name, ones)
        for item in self._session.get_outputs():
            binding.bind_output(item.name, self._device)

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


class EngineRunner:
    """An engine over torch's memory and stream, so that torch's events time it. Not thread-safe."""

    def __init__(self, engine: Engine, inputs: list[str]) -> None:
        import torch

        cuda: Any = torch.cuda
        cuda.set_stream(cuda.Stream())  # TensorRT synchronises more on the default one
        _, [self._engine] = load_engines([engine.file_path], engine.flavour)
        self._context = self._engine.create_execution_context()
        self._inputs = inputs
        everything = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._output = next(name for name in everything if name not in inputs)

    def outputs(self, feeds: Feeds) -> NDArray[np.float32]:
        launch, output = self._bound(feeds)
        launch()
        result: NDArray[np.float32] = output.cpu().numpy()
        return result

    def call(self, batch: int, length: int) -> Call:
        return self._bound(dict.fromkeys(self._inputs, np.ones((batch, length), np.int64)))[0]

    def _bound(self, feeds: Feeds) -> tuple[Call, Any]:
        """What launches the engine on these inputs, and where its output will lie; it keeps the tensors alive."""
        import torch

        tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        for name, tensor in tensors.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        output = torch.empty(tuple(self._context.get_tensor_shape(self._output)), dtype=torch.float32, device="cuda")
        self._context.set_tensor_address(self._output, output.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream

        def launch(kept: object = (tensors, output)) -> None:
            if not self._context.execute_async_v3(stream):
                raise ParityError("TensorRT did not run the engine")

        return launch, output
