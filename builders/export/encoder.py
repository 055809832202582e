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
from builders.errors import CheckpointError, ParityError
from builders.export.program import quiet_exporter, save_model
from builders.graph import GRAPH_FILE, OPSET, record_graph, require_standard
from builders.quality import graph_outputs, measure, sample_requests
from runtime.encoder import Encoder
from runtime.executor import Tensors

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

    Raises CheckpointError when weights are missing; ParityError when the graph computes something else.
    """
    model = _load_model(checkpoint)
    requests = sample_requests(checkpoint, texts[:_PARITY_TEXTS])
    reference = np.concatenate(Encoder(_EagerExecutor(model, checkpoint), 1024, checkpoint.max_length).run(requests))
    file = out / GRAPH_FILE
    _write_graph(model, checkpoint, precision, file)
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


def _load_model(checkpoint: Checkpoint) -> torch.nn.Module:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    embedding = checkpoint.task == "embedding"
    loader = transformers.AutoModel if embedding else transformers.AutoModelForSequenceClassification
    model, info = loader.from_pretrained(
        checkpoint.directory,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # reported below, in our words
    )
    # An embedding never uses the pooler. Anything else that is absent would be random numbers.
    missing = [key for key in info["missing_keys"] if not (embedding and key.startswith("pooler."))]
    mismatched = [str(key[0]) for key in info["mismatched_keys"]]
    if missing or mismatched:
        raise CheckpointError(
            f"weights of {checkpoint.source} for task {checkpoint.task}",
            got=f"{len(missing)} missing, {len(mismatched)} of another shape "
            f"({', '.join([*sorted(missing), *sorted(mismatched)][:4])})",
            expected=f"every weight of {type(model).__name__}, as config.json describes it",
            fix="choose the task that the checkpoint was trained for, and its own config.json",
        )
    return model.eval()  # type: ignore[no-any-return]


class _EagerExecutor:
    """The fp32 model as transformers runs it, pooled apart from the graph's own code."""

    description = "transformers eager fp32"

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        self._model, self._checkpoint = model, checkpoint

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
        hidden: NDArray[np.float32] = output.last_hidden_state.numpy()
        if self._checkpoint.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            counts = batch["attention_mask"].sum(axis=1)
            vectors = np.stack([hidden[row, :count].mean(axis=0) for row, count in enumerate(counts)])
        if self._checkpoint.normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def _write_graph(model: torch.nn.Module, checkpoint: Checkpoint, precision: str, file: Path) -> None:
    import torch

    model = model.half() if precision == "fp16" else model.float()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if checkpoint.token_type_ids else [])]
    # Different tensors: one tensor given twice would merge the two inputs into one, silently.
    example = tuple(torch.ones(2, 7, dtype=torch.int64) * (index == 1) for index in range(len(names)))
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=checkpoint.max_length)}
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            _graph_module(model, checkpoint),
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


def _graph_module(model: torch.nn.Module, checkpoint: Checkpoint) -> torch.nn.Module:
    import torch

    class EncoderGraph(torch.nn.Module):
        """The model with its mask, positions, pooling and normalisation spelled out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            config: Any = model.config
            self.offset = position_offset(checkpoint.model_type, config.to_dict())
            self.typed = bool(getattr(config, "type_vocab_size", 0)) and checkpoint.model_type != "mpnet"
            self.bool_mask = config._attn_implementation == "sdpa"
            self.dtype: torch.dtype = next(model.parameters()).dtype

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
                mask = torch.where(mask, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
            arguments = {"position_ids": torch.arange(length)[None] + self.offset}
            if self.typed:
                arguments["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            output = self.model(input_ids=input_ids, attention_mask=mask, **arguments)
            if checkpoint.task != "embedding":
                return output.logits.float()  # type: ignore[no-any-return]
            return self._pool(output.last_hidden_state.float(), attention_mask)

        def _pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            if checkpoint.pooling == "cls":
                vectors = hidden[:, 0]
            else:
                weights = attention_mask[..., None].float()
                vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            if checkpoint.normalize:
                vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-12)
            return vectors

    return EncoderGraph().eval()
