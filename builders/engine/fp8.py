"""Which GPUs multiply FP8. TensorRT for RTX says of others no more than "Invalid Engine"."""

from __future__ import annotations

from pathlib import Path

from builders.errors import SpecError
from builders.spec import FP8_TARGET


def require_fp8(graph: Path, target: str) -> None:
    """Raises SpecError for a graph with numbers in FP8 and a target whose multiprocessors have none."""
    import onnx

    kinds = {tensor.data_type for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}
    if onnx.TensorProto.FLOAT8E4M3FN in kinds and int(target.removeprefix("sm")) < FP8_TARGET:
        raise SpecError(
            "engine.targets", got=f"{target} for {graph.name}, a graph in FP8",
            expected=f"sm{FP8_TARGET} or newer: older multiprocessors do not multiply FP8",
            fix="use int8 or fp16 there",
        )  # fmt: skip
