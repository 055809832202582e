"""OpenVINO's intermediate representation: OUTPUT.xml with its weights in OUTPUT.bin."""

from __future__ import annotations

import os
from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.edge.target import EdgeTarget
from builders.errors import UnsupportedError
from runtime.encoding.executor.openvino import OpenVinoExecutor


def convert(graph: OnnxGraph, checkpoint: Checkpoint, target: Path) -> str:
    """Weights and arithmetic as they are: the quantised stay so, and nothing is rounded to fp16."""
    return convert_file(graph.file_path, target)


def convert_file(source: Path, target: Path) -> str:
    import openvino
    from openvino.frontend import GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure

    failures = (GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure, RuntimeError)
    try:
        openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
    except failures as error:  # an operator that it does not know, or a shape that it does not see
        raise UnsupportedError(
            f"graph {source}", got=f"OpenVINO's converter says: {error}", expected="a graph that it converts",
            fix="use the ONNX graph itself",
        ) from error  # fmt: skip
    return str(openvino.__version__).split("-")[0]


def open_file(file: Path, checkpoint: Checkpoint) -> OpenVinoExecutor:
    return OpenVinoExecutor(file, threads=os.cpu_count() or 1, bfloat16=False)


OPENVINO = EdgeTarget(
    "openvino", ".xml", ("fp32", "fp16", "int8"), "use the ONNX graph itself", convert, open_file, parts=(".bin",)
)
