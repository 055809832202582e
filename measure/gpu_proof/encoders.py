"""Encoders over a grid of batch and length: transformers' own BERT in torch, and TensorRT engines, built as users build
them and compared with ONNX Runtime.

Weights are random but for MiniLM where its package is installed: speed does not ask what they say. Without a GPU the
engines are built all the same, ahead of time, and ONNX Runtime runs the graph that one was built from in its place.
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
from builders.spec import FP8_TARGET, Flavour
from measure.gpu_proof.folders import bert_config, built_row, encoder_spec, stand_in, weights_note
from measure.gpu_proof.machine import require_torch, try_flavour
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import EncoderShape, against, encoder_work
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import NotRun, captured, in_time, seconds_of
from runtime.session import open_session
from runtime.tensorrt.executor import load_engines

LEAST_COSINE = {"fp16": 0.999, "int8": 0.98, "fp8": 0.98}  # of the worst text to the fp32 graph
_TEXTS = 64
Call = Callable[[], Any]  # gives what lies on the device
Feeds = Mapping[str, NDArray[Any]]
Bind = Callable[[Feeds], Call]


def timed_grid(
    setting: Setting, shape: EncoderShape, how: str, prepare: Callable[[int, int], Call]
) -> Iterator[Measured]:
    """A row for each size. `prepare(batch, length)` gives the call to time. Held against the limits at the setting's
    own precision, engines of eight bits too.
    """

    def measured(row: Measured) -> Iterator[Measured]:
        batch, length = row.axes["batch"], row.axes["length"]
        seconds = seconds_of(prepare(batch, length), setting)
        work = encoder_work(shape, batch, length, setting.value_bytes)
        yield against(row, work, seconds, setting.limits, sentences_per_s=batch / seconds)

    rows = (
        Measured(f"{shape.name}, batch {batch} x length {length}", how, {"batch": batch, "length": length})
        for length, batch in product(setting.lengths, setting.batches)
    )
    return in_time(setting, ((row, measured) for row in rows))


def measure(setting: Setting) -> Iterator[Measured]:
    """In torch; the better way first."""
    torch = require_torch(setting, "transformers")
    from transformers import BertModel

    for shape, compiled in product(setting.encoders, (True, False)):
        model = BertModel(bert_config(shape), add_pooling_layer=False).eval()
        model = model.to(setting.device, getattr(torch, setting.dtype))
        if compiled:
            # Layers share what is compiled, for any batch and length: a whole model a size would take minutes.
            for layer in model.encoder.layer:
                layer.compile(backend=setting.compiler, dynamic=True)
        how = "torch eager" if not compiled else "torch.compile" if setting.dry else "torch.compile + CUDA graph"
        yield from timed_grid(setting, shape, how, partial(_torch_call, setting, model, compiled))


def _torch_call(setting: Setting, model: Any, graphs: bool, batch: int, length: int) -> Call:
    """Mean-pooled vectors of full texts. Without padding there is no mask, as a good server would have it."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=setting.device)
    encode = torch.no_grad()(lambda: model(input_ids=ids).last_hidden_state.mean(1))
    return captured(encode, setting) if graphs else encode


def measure_engines(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    try_flavour(flavour, setting)
    cases = (
        (Measured(f"{shape.name}, engine", f"{flavour} engine, {precision}"),
         partial(_engine, setting, flavour, shape, precision))
        for shape, precision in product(setting.encoders, LEAST_COSINE)
        # Random weights have no quality that eight bits could keep or lose.
        if precision == "fp16" or weights_note(shape) == "real weights"
    )  # fmt: skip
    return in_time(setting, cases)


def _engine(
    setting: Setting, flavour: Flavour, shape: EncoderShape, precision: str, row: Measured
) -> Iterator[Measured]:
    if precision == "fp8" and int(setting.target.removeprefix("sm")) < FP8_TARGET:
        raise NotRun(f"FP8 needs SM{FP8_TARGET} or newer")
    try:
        built = pipeline.build(encoder_spec(shape, setting, flavour, precision), "gpu", setting.scratch, "engine")
    except QualityError as error:
        raise NotRun(str(error)) from error
    yield built_row(setting, built.engines[0], row.case, row.how)
    how = row.how + stand_in(setting)
    bind = graph_runner(built.served_graph.file_path) if setting.dry else engine_runner(built.engines[0])
    yield _compared(built, bind, shape, how, LEAST_COSINE[precision])

    def full_texts(batch: int, length: int) -> Call:
        return bind({tensor.name: np.ones((batch, length), np.int64) for tensor in built.served_graph.inputs})

    yield from timed_grid(setting, shape, how, full_texts)


def _compared(built: Build, bind: Bind, shape: EncoderShape, how: str, least: float) -> Measured:
    """Raises ParityError for an engine that computes something else than the fp32 graph."""
    requests = vectors.sample_requests(built.checkpoint, corpus.texts(None, _TEXTS))
    reference = vectors.graph_outputs(built.graph("fp32").file_path, requests, built.checkpoint)
    candidate = np.concatenate([output_of(bind(feeds)) for feeds in requests])
    found = vectors.measure(reference, candidate, "embedding", how)
    if not found.worst_cosine >= least:
        raise ParityError(
            f"{shape.name}, {how}: worst cosine to the fp32 graph {found.worst_cosine:.5f} over {found.texts} texts, "
            f"limit {least}"
        )
    figures = {"mean_cosine": found.mean_cosine, "worst_cosine": found.worst_cosine}
    return Measured(f"{shape.name}, against ONNX Runtime fp32", how, figures=figures, note=weights_note(shape))


def output_of(call: Call) -> NDArray[np.float32]:
    made = call()
    return made if isinstance(made, np.ndarray) else np.asarray(made.cpu())


def graph_runner(file: Path) -> Bind:
    """A graph by ONNX Runtime on the CPU."""
    session = open_session(file, threads=1)
    return lambda feeds: lambda: session.run(None, dict(feeds))[0]


def engine_runner(engine: Engine) -> Bind:
    """An engine over torch's memory and stream, so that torch's timer waits for it: what is bound last is what runs."""
    import torch

    cuda: Any = torch.cuda
    cuda.set_stream(cuda.Stream())  # TensorRT synchronises more on the default one
    _, [loaded] = load_engines([engine.file_path], engine.flavour)
    context, stream = loaded.create_execution_context(), cuda.current_stream().cuda_stream
    names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]

    def bind(feeds: Feeds) -> Call:
        tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
        [output] = [name for name in names if name not in feeds]
        tensors[output] = torch.empty(tuple(context.get_tensor_shape(output)), device="cuda")
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())

        def launch() -> torch.Tensor:
            if not context.execute_async_v3(stream):
                raise ParityError("TensorRT did not run the engine")
            return tensors[output]

        return launch

    return bind
