"""MNN's own format: one file, of any batch and length."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tempfile
from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.edge.plain import write_plain
from builders.edge.script import EdgeScript, ScriptExecutor, ScriptFailed
from builders.edge.target import EdgeTarget
from builders.errors import MachineError, UnsupportedError
from builders.export.encoder import output_name

SCRIPT = EdgeScript(sys.executable, Path(__file__).with_name("mnn_script.py"))


def convert(graph: OnnxGraph, checkpoint: Checkpoint, target: Path) -> str:
    """Weights in the graph's own precision. Arithmetic is the device's choice; on a CPU it is fp32."""
    version = _version()
    with tempfile.TemporaryDirectory(prefix="trireme-mnn-") as folder:
        plain = Path(folder, "plain.onnx")
        write_plain(graph.file_path, plain)
        try:
            # Without the option it widens fp16 weights.
            SCRIPT.run("convert", plain, target, *(["--fp16"] if graph.precision == "fp16" else []))
        except ScriptFailed as error:
            raise UnsupportedError(
                f"graph {graph.file_path}", got=f"MNN's converter says: {error}", expected="a graph that it converts",
                fix="use --target openvino, or the ONNX graph itself",
            ) from error  # fmt: skip
    return version


def _version() -> str:
    if importlib.util.find_spec("MNN") is None:
        raise MachineError(
            "--target mnn", got="no package MNN", expected="MNN's converter and runtime",
            fix="pip install 'trireme[edge]'",
        )  # fmt: skip
    return importlib.metadata.version("MNN")


def open_file(file: Path, checkpoint: Checkpoint) -> ScriptExecutor:
    return ScriptExecutor(SCRIPT, file, output_name(checkpoint), f"MNN {_version()}")


MNN = EdgeTarget(
    "mnn", ".mnn", ("fp32", "fp16"),
    "give the graph in fp16: MNN's converter widens the weights of an INT8 graph to fp32, four times their size",
    convert, open_file,
)  # fmt: skip
