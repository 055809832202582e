"""Encoders over a grid of batch and length: transformers' own BERT in torch, and the exported graph by ONNX Runtime.

Weights are random but for MiniLM where its package is installed: speed does not ask what they say.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from measure.gpu_proof.folders import bert_config, weights_note
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import EncoderShape, Limits, against, encoder_work
from measure.gpu_proof.setting import Budget, NotRun, Setting
from measure.gpu_proof.timing import device_seconds


def encoder_case(shape: EncoderShape, batch: int, length: int) -> str:
    return f"{shape.name}, batch {batch} x length {length}"


def grid(setting: Setting) -> Iterator[tuple[int, int]]:
    return ((batch, length) for length in setting.lengths for batch in setting.batches)


def encoder_row(
    setting: Setting, limits: Limits | None, shape: EncoderShape, how: str, size: tuple[int, int], seconds: float
) -> Row:
    """Held against the limits at the setting's own precision, INT8 engines too."""
    batch, length = size
    figures, facts = against(encoder_work(shape, batch, length, setting.value_bytes), seconds, limits)
    axes = {"batch": batch, "length": length}
    return Row(encoder_case(shape, *size), how, axes, {**figures, "sentences_per_s": batch / seconds}, facts)


def timed_grid(
    setting: Setting,
    limits: Limits | None,
    budget: Budget,
    shape: EncoderShape,
    how: str,
    prepare: Callable[[int, int], Callable[[], object]],
) -> Iterator[Row]:
    """A row for each size. `prepare(batch, length)` gives the call to time."""
    longest = 0.0
    for size in grid(setting):
        began = time.monotonic()
        if budget.left_s < 2 * longest:
            yield Row(encoder_case(shape, *size), how, reason="time")
            continue
        yield encoder_row(setting, limits, shape, how, size, device_seconds(prepare(*size), setting))
        longest = max(longest, time.monotonic() - began)


def measure(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    require_torch(setting)
    if importlib.util.find_spec("transformers") is None:
        raise NotRun("no module transformers, whose BERT is measured")
    for shape in setting.encoders:
        yield from _measure_torch(shape, setting, limits, budget, compiled=True)
        yield from _measure_torch(shape, setting, limits, budget, compiled=False)


def _measure_torch(
    shape: EncoderShape, setting: Setting, limits: Limits | None, budget: Budget, *, compiled: bool
) -> Iterator[Row]:
    model = bert(shape, setting)
    if compiled:
        # Layers share what is compiled, for any batch and length: a whole model a size would take minutes.
        for layer in model.encoder.layer:
            layer.compile(backend=setting.compiler, dynamic=True)
    graphs = compiled and setting.device == "cuda"
    how = ("torch.compile" if compiled else "torch eager") + (" + CUDA graph" if graphs else "")
    rows = timed_grid(setting, limits, budget, shape, how, lambda *size: _call(setting, model, size, graphs))
    yield from (replace(row, note=weights_note(shape)) for row in rows)


def bert(shape: EncoderShape, setting: Setting) -> Any:
    """transformers' BertModel on the device."""
    import torch
    from transformers import BertConfig, BertModel

    if weights_note(shape) == "real weights":
        from measure.gpu_proof.folders import packaged_minilm

        model = BertModel.from_pretrained(packaged_minilm(), add_pooling_layer=False)
    else:
        torch.manual_seed(0)
        model = BertModel(bert_config(shape, BertConfig), add_pooling_layer=False)
    return model.eval().to(setting.device, getattr(torch, setting.dtype))


def _call(setting: Setting, model: Any, size: tuple[int, ...], graphs: bool) -> Callable[[], object]:
    """Mean-pooled vectors of full texts. Without padding there is no mask, as a good server would have it."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, size, device=setting.device)

    def encode() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state.mean(1)  # type: ignore[no-any-return]

    if not graphs:
        return encode
    for _ in range(3):  # compiled and warm before a capture, which allows neither
        encode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode()
    return graph.replay


def measure_onnxruntime(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    """The very graph that engines are built from, by ONNX Runtime on the device; inputs lie there already."""
    import onnxruntime

    from measure.gpu_proof.folders import encoder_graph

    provider = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NotRun(f"this onnxruntime {onnxruntime.__version__} has no {provider}: install onnxruntime-gpu")
    for shape in setting.encoders:
        graph = encoder_graph(shape, setting)
        session = onnxruntime.InferenceSession(str(graph), providers=[provider])
        if session.get_providers()[0] != provider:
            raise NotRun(f"{provider} does not start here: its libraries are missing or of another release")
        yield from timed_grid(
            setting,
            limits,
            budget,
            shape,
            f"ONNX Runtime {provider.removesuffix('ExecutionProvider')}",
            lambda batch, length, session=session: _bound(session, setting, batch, length),  # type: ignore[misc]
        )


def _bound(session: Any, setting: Setting, batch: int, length: int) -> Callable[[], object]:
    import numpy as np
    import onnxruntime

    binding = session.io_binding()
    for item in session.get_inputs():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((batch, length), np.int64), setting.device, 0)
        binding.bind_ortvalue_input(item.name, value)
    for item in session.get_outputs():
        binding.bind_output(item.name, setting.device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call
