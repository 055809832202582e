"""Encoder checkpoints -> one standard ONNX graph, pooling and heads inside.

Inputs `input_ids`, `attention_mask` (and `token_type_ids` for pairs), int64 [batch, length], padded on the right.
Output `embedding` [batch, hidden] or `logits` [batch, labels], float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Checkpoint, OnnxGraph
from builders.checkpoint import position_offset
from builders.errors import ParityError
from builders.export.sentence import head_modules, pool, reference_vectors
from builders.export.tokenizer import require_tokenizer
from builders.export.weights import load_encoder, require_sound
from builders.export.write import exporter_faults, quiet_exporter, save_model
from builders.graph import GRAPH_FILE, OPSET, record_graph, require_standard
from builders.judging.vectors import graph_outputs, measure, sample_requests
from runtime.encoding.encoder import Encoder
from runtime.graph import Tensors

if TYPE_CHECKING:
    import onnx_ir
    import torch

_PARITY_TEXTS = 64
_MAX_FP32_DIFFERENCE = 1e-5  # relative to the largest output, or absolute where that is under 1
_MIN_FP16_COSINE = 0.9999


def output_name(checkpoint: Checkpoint) -> str:
    return "embedding" if checkpoint.task == "embedding" else "logits"


def export_encoder(
    checkpoint: Checkpoint, precision: Literal["fp32", "fp16"], texts: Sequence[str], out: Path
) -> OnnxGraph:
    """Writes `graph.onnx` into `out`, checked against the eager fp32 model on `texts`.

    Raises CheckpointError when weights are missing, left over or not numbers, or where tokenizer.json is not what
    transformers reads; ParityError when the graph computes something else.
    """
    require_tokenizer(checkpoint, texts)
    model, head = load_encoder(checkpoint), head_modules(checkpoint)
    requests = sample_requests(checkpoint, texts[:_PARITY_TEXTS])
    eager = Encoder(_EagerExecutor(model, head, checkpoint), 1024, checkpoint.max_length)
    reference = np.concatenate(eager.run(requests))
    require_sound(reference, checkpoint)
    file = out / GRAPH_FILE
    write_graph(model, head, checkpoint, precision, file)
    require_standard(file)
    quality = measure(reference, graph_outputs(file, requests, checkpoint), checkpoint.task, "ONNX Runtime")
    scale = max(1.0, float(np.abs(reference).max()))
    if precision == "fp32" and not quality.max_abs_difference <= _MAX_FP32_DIFFERENCE * scale:
        raise ParityError(
            f"fp32 graph of {checkpoint.source}: largest difference to eager {quality.max_abs_difference:.2e} "
            f"over {quality.texts} texts, limit {_MAX_FP32_DIFFERENCE * scale:.0e}; the graph is not used"
        )
    if precision == "fp16" and not quality.worst_cosine >= _MIN_FP16_COSINE:
        raise ParityError(
            f"fp16 graph of {checkpoint.source}: worst cosine to eager fp32 {quality.worst_cosine:.6f} "
            f"over {quality.texts} texts, limit {_MIN_FP16_COSINE}; the model overflows fp16, use fp32 or int8"
        )
    return record_graph(out, precision, quality, checkpoint.digest)


class _EagerExecutor:
    """The fp32 model as transformers runs it, pooled apart from the graph's own code."""

    description = "transformers eager fp32"

    def __init__(self, model: torch.nn.Module, head: Sequence[torch.nn.Module], checkpoint: Checkpoint) -> None:
        self._model, self._head, self._checkpoint = model, head, checkpoint

    @property
    def lanes(self) -> int:
        return 1

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Tensors) -> NDArray[np.float32]:
        import torch

        with torch.no_grad():
            output = self._model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        if self._checkpoint.task != "embedding":
            return output.logits.numpy()  # type: ignore[no-any-return]
        counts = batch["attention_mask"].sum(axis=1).tolist()
        return reference_vectors(output.last_hidden_state.numpy(), counts, self._checkpoint, self._head)


def write_graph(
    model: torch.nn.Module, head: Sequence[torch.nn.Module], checkpoint: Checkpoint, precision: str, file: Path
) -> None:
    import torch

    model = model.half() if precision == "fp16" else model.float()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if checkpoint.token_type_ids else [])]
    # Different tensors: one tensor given twice would merge the two inputs into one, silently.
    example = tuple(torch.ones(2, 7, dtype=torch.int64) * (index == 1) for index in range(len(names)))
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=checkpoint.max_length)}
    with torch.no_grad(), quiet_exporter(), exporter_faults():
        program = torch.onnx.export(
            graph_module(model, head, checkpoint),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["output"],
            dynamic_shapes=tuple(dims for _ in names),
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns a program
    _name_output(program.model, output_name(checkpoint))
    save_model(program.model, file)


def _name_output(model: onnx_ir.Model, name: str) -> None:
    """The exporter calls a value inside the graph `embedding` too; asked for that output name, it writes both."""
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                value.name = f"{name}_inner"
    model.graph.outputs[0].name = name


def graph_module(model: torch.nn.Module, head: Sequence[torch.nn.Module], checkpoint: Checkpoint) -> torch.nn.Module:
    import torch

    class EncoderGraph(torch.nn.Module):
        """The model with its mask, positions, pooling and normalisation spelled out."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = model, torch.nn.Sequential(*head)
            config: Any = model.config
            self.offset = position_offset(checkpoint.model_type, config.to_dict())
            self.typed = bool(getattr(config, "type_vocab_size", 0)) and checkpoint.model_type != "mpnet"
            self.bool_mask = config._attn_implementation == "sdpa"

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            batch, length = input_ids.shape
            # [batch, 1, length, length]; the query dimension is spelled out for ONNX Runtime's Attention on CPU
            mask = attention_mask[:, None, None, :].bool().expand(batch, 1, length, length)
            if not self.bool_mask:
                dtype = next(self.model.parameters()).dtype  # as it is now: training casts
                mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
            arguments = {"position_ids": torch.arange(length)[None] + self.offset}
            if self.typed:
                arguments["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            output = self.model(input_ids=input_ids, attention_mask=mask, **arguments)
            if checkpoint.task != "embedding":
                return output.logits.float()  # type: ignore[no-any-return]
            assert checkpoint.pooling is not None
            vectors: torch.Tensor = self.head(
                pool(output.last_hidden_state.float(), attention_mask, checkpoint.pooling)
            )
            return vectors

    return EncoderGraph().eval()
