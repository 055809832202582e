"""A torch module -> one ONNX file: the export itself, and what every file of ours has in common."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.errors import TriremeError, UnsupportedError
from builders.graph import OPSET, write_model

if TYPE_CHECKING:
    import onnx_ir
    import torch

Dims = Mapping[int, str]  # axis of an input -> the name of its dynamic dimension


def write_program(
    module: torch.nn.Module,
    example: tuple[Any, ...],
    dims: Sequence[Dims],
    inputs: Sequence[str],
    outputs: Sequence[str],
    file: Path,
) -> None:
    """Exports `module` to `file`, with its weights beside it in `file`.data where they are large.

    `dims` names the dynamic axes of each input. No two tensors of `example` may be the same object: the exporter would
    merge them into one input, silently. Raises UnsupportedError for a model that cannot be traced.
    """
    import torch

    class Flat(torch.nn.Module):
        """torch.export wants the shapes of a star argument as one tuple; this takes care of it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> Any:
            return self.inner(*tensors)

    with torch.no_grad(), quiet_exporter(), exporter_faults():
        program = torch.export.export(Flat().eval(), example, dynamic_shapes=(tuple(map(_shapes, dims)),), strict=False)
        exported = torch.onnx.export(
            program, args=(), dynamo=True, opset_version=OPSET, input_names=list(inputs),
            output_names=list(outputs), verbose=False,
        )  # fmt: skip
    assert exported is not None  # dynamo=True always returns a program
    _name_dims(exported.model, dims)
    save_model(exported.model, file)


@contextmanager
def exporter_faults() -> Iterator[None]:
    """Raises UnsupportedError for a model that cannot be traced, with the first fault of all."""
    try:
        yield
    except TriremeError:
        raise
    except Exception as error:  # the model's own code runs on symbols here, and may raise anything
        raise UnsupportedError(
            "graph of the model", got=_root(error), expected="code that torch.export can trace",
            fix="use another model, or another release of transformers",
        ) from error  # fmt: skip


def save_model(model: onnx_ir.Model, file: Path) -> None:
    """Without the exporter's notes on every node, and with large weights beside the file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)  # stack traces: paths of this machine, never twice the same
    write_model(model, file)


def _root(error: BaseException) -> str:
    """The first line of what went wrong first; the exporter wraps it in advice on itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _shapes(dims: Dims) -> dict[int, Any]:
    import torch

    # A dimension of size 1 would be taken for a constant, unless its range is said to begin there.
    return {axis: torch.export.Dim(name, min=1) for axis, name in dims.items()}


def _name_dims(model: onnx_ir.Model, dims: Sequence[Dims]) -> None:
    """The exporter numbers dynamic dimensions; here they get our names, wherever a shape mentions them."""
    import onnx_ir

    names = {
        str(value.shape[axis]): name
        for value, named in zip(model.graph.inputs, dims, strict=True)
        if value.shape is not None
        for axis, name in named.items()
    }
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(size), size) for size in value.shape])


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes about torchvision and deprecations, which no user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
