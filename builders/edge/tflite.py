"""TFLite files, by Google's litert-torch, for LiteRT: one text of a fixed length at a time.

litert-torch reads PyTorch's programs and no ONNX, so that the file is made of the graph's checkpoint, and compared with
the graph. It wants numpy 2 and protobuf 7, and so an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from functools import partial
from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.edge.script import EdgeScript, ScriptExecutor, ScriptFailed
from builders.edge.target import EdgeTarget
from builders.errors import MachineError, UnsupportedError
from builders.export.encoder import graph_module
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder

_FILE = Path(__file__).with_name("litert_script.py")
_OUTPUT = "output_0"  # as the converter calls it
LITERT = ("litert-torch==0.10.0", "ai-edge-litert==2.3.0")


def tflite(python: str | None, length: int) -> EdgeTarget:
    """`python` is the interpreter of that environment, `length` the model's longest text."""
    script = EdgeScript(python or "", _FILE)
    return EdgeTarget(
        "tflite", ".tflite", ("fp32",),
        "give the graph in fp32: litert-torch converts the checkpoint, not what ONNX tools made of it",
        partial(_convert, script), partial(_open, script), length=length,
    )  # fmt: skip


def _convert(script: EdgeScript, graph: OnnxGraph, checkpoint: Checkpoint, target: Path) -> str:
    version = _versions(script)["litert-torch"]
    with tempfile.TemporaryDirectory(prefix="trireme-tflite-") as folder:
        program = Path(folder, "program.pt2")
        _save_program(checkpoint, program)
        try:
            script.run("convert", program, target)
        except ScriptFailed as error:
            raise UnsupportedError(
                f"checkpoint {checkpoint.source}", got=f"litert-torch says: {error}",
                expected="a model that it converts", fix="use --target openvino, or the ONNX graph itself",
            ) from error  # fmt: skip
    return version


def _save_program(checkpoint: Checkpoint, file: Path) -> None:
    """The module that becomes the ONNX graph, for one text of the longest length."""
    import torch

    module = graph_module(load_encoder(checkpoint).float(), head_modules(checkpoint), checkpoint)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if checkpoint.token_type_ids else [])]
    ones = {name: torch.ones(1, checkpoint.max_length, dtype=torch.int64) for name in names}
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (), ones), file)


def _versions(script: EdgeScript) -> dict[str, str]:
    """Raises MachineError without an interpreter that has the packages, or with another torch: one writes the program
    and the other reads it."""
    torch = importlib.metadata.version("torch").split("+")[0]
    fix = "python3.11 -m venv litert && litert/bin/pip install " + " ".join((f"torch=={torch}", *LITERT))
    fix += ", then give --litert-python litert/bin/python"
    expected = "a Python that has litert-torch, which wants other versions than Trireme"
    if not script.python:
        raise MachineError("--litert-python", got="none", expected=expected, fix=fix)
    try:
        found: dict[str, str] = json.loads(script.run("check"))
    except (ScriptFailed, ValueError) as error:
        raise MachineError(f"--litert-python {script.python}", got=str(error), expected=expected, fix=fix) from error
    if found["torch"].split("+")[0] != torch:
        raise MachineError(
            f"--litert-python {script.python}", got=f"torch {found['torch']}", expected=f"torch {torch}", fix=fix
        )
    return found


def _open(script: EdgeScript, file: Path, checkpoint: Checkpoint) -> ScriptExecutor:
    return ScriptExecutor(script, file, _OUTPUT, f"LiteRT {_versions(script)['ai-edge-litert']}")
