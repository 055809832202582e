"""The linear layers of an encoder's graph: products with a constant weight, grouped by the activation they read."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from builders.errors import ParityError
from builders.quantize.scales import Floats
from runtime.graph import Tensors
from runtime.session import open_session

BATCH = 16  # texts in a run of the graph


@dataclass(frozen=True)
class Group:
    """The linear layers that read one activation, by their position among all linear layers of the graph."""

    members: tuple[int, ...]
    weights: int
    loss: float = 0.0


def linears_of(model: ir.Model) -> list[ir.Node]:
    """In graph order, which the fp32 and fp16 export of one model share."""
    return [
        node
        for node in model.graph
        if node.op_type == "MatMul"
        and (weight := node.inputs[1]) is not None
        and weight.is_initializer()
        and weight.shape is not None
        and len(weight.shape) == 2
    ]


def groups_of(model: ir.Model) -> list[Group]:
    """Linear layers that read the same activation share its smoothing factors and its quantised form."""
    readers: dict[str, list[int]] = {}
    sizes = []
    for index, node in enumerate(linears_of(model)):
        readers.setdefault(str(input_of(node, 0).name), []).append(index)
        sizes.append(weight_of(node).size)
    return [Group(tuple(members), sum(sizes[i] for i in members)) for members in readers.values()]


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def weight_of(node: ir.Node) -> Floats:
    """[K, N]"""
    tensor = input_of(node, 1).const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32)


def activations(file: Path, names: Collection[str], requests: Sequence[Tensors]) -> Iterator[tuple[str, Floats]]:
    """What the linear layers that read `names` are given, [tokens or texts, K], batch by batch, without padding: from
    runs of the graph with every such activation as an extra output."""
    model = ir.load(file)
    read = {str(value.name): value for node in linears_of(model) if (value := input_of(node, 0)).name in names}
    by_token = {name for name, value in read.items() if _is_by_token(model, value)}
    model.graph.outputs.extend(value for value in read.values() if value not in model.graph.outputs)
    with tempfile.TemporaryDirectory(prefix="trireme-calibration-") as folder:
        probe = Path(folder) / "probe.onnx"
        ir.save(model, probe, external_data="probe.onnx.data")
        session = open_session(probe)
        for feeds in _stack(requests):
            real = feeds["attention_mask"].astype(bool)
            for name, array in zip(read, session.run(list(read), feeds), strict=True):
                # A layer on pooled vectors is [batch, K]; one on tokens is [batch, length, K], padding left out.
                tokens = array[real] if name in by_token else array.reshape(-1, array.shape[-1])
                yield name, tokens.astype(np.float32)


def _is_by_token(model: ir.Model, value: ir.Value) -> bool:
    """Whether `value` begins with the batch and the length of the ids: by the names of the dimensions, since sizes may
    be the same by chance."""
    ids = next(given for given in model.graph.inputs if given.name == "input_ids")
    if value.shape is None or ids.shape is None:
        raise ParityError(f"activation {value.name} has no shape in the graph, so its tokens cannot be told")
    return len(value.shape) > 2 and list(value.shape[:2]) == list(ids.shape)


def _stack(requests: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Requests of one row each in batches of alike lengths, padded with zeros."""
    ordered = sorted(requests, key=lambda feeds: feeds["input_ids"].shape[1])
    batches = []
    for start in range(0, len(ordered), BATCH):
        group = ordered[start : start + BATCH]
        longest = group[-1]["input_ids"].shape[1]
        batches.append(
            {
                name: np.concatenate([np.pad(f[name], ((0, 0), (0, longest - f[name].shape[1]))) for f in group])
                for name in group[0]
            }
        )
    return batches
