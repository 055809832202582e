"""One rank's graph as a program: pieces that ONNX Runtime runs, with the collectives between them.

ONNX Runtime does not know `DistCollective`, so the graph is parted there. A node belongs to the piece behind the last
collective that its inputs depend on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from builders.errors import CheckError
from runtime.ranks.program import Communicate, RunGraph

COLLECTIVE = "DistCollective"


def read_rank(file: Path) -> onnx.ModelProto:
    """The graph without its external weights. Raises CheckError when it cannot be read."""
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf raises many unrelated types for damaged bytes
        raise CheckError(f"{file.name} cannot be read: {type(error).__name__}: {error}") from error


def collectives(model: onnx.ModelProto) -> list[Communicate]:
    """In the order of the graph."""
    return [_communicate(node) for node in model.graph.node if node.op_type == COLLECTIVE]


def program_steps(model: onnx.ModelProto) -> tuple[RunGraph | Communicate, ...]:
    levels = _levels(model.graph.node)
    behind: dict[int, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        behind.setdefault(levels[_first(node)] - (node.op_type == COLLECTIVE), []).append(node)
    kept = {value.name for value in model.graph.output}
    types = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    steps: list[RunGraph | Communicate] = []
    for level in sorted(behind):
        nodes = [node for node in behind[level] if node.op_type != COLLECTIVE]
        joins = [node for node in behind[level] if node.op_type == COLLECTIVE]
        others = [node for at in behind if at > level for node in behind[at]] + joins
        wanted = kept | {name for node in others for name in node.input}
        if any(name in wanted for node in nodes for name in node.output):  # else nobody needs what they make
            steps.append(_piece(model, nodes, wanted, types, weights))
        steps.extend(_communicate(node) for node in joins)
    return tuple(steps)


def _levels(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    """Collectives that each value depends on, at most in a row."""
    levels: dict[str, int] = {}
    for node in nodes:
        level = max((levels.get(name, 0) for name in node.input), default=0) + (node.op_type == COLLECTIVE)
        levels.update(dict.fromkeys(node.output, level))
    return levels


def _first(node: onnx.NodeProto) -> str:
    return str(next(name for name in node.output if name))


def _piece(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    wanted: set[str],
    types: dict[str, onnx.ValueInfoProto],
    weights: dict[str, onnx.TensorProto],
) -> RunGraph:
    made = {name for node in nodes for name in node.output if name}
    used = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))
    inputs = [name for name in used if name not in weights]
    outputs = [
        name for name in dict.fromkeys(name for node in nodes for name in node.output) if name in wanted and name
    ]
    missing = [name for name in (*inputs, *outputs) if name not in types]
    if missing:
        raise CheckError(f"the graph tells no type of {', '.join(missing[:4])}, which passes between its pieces")
    graph = onnx.helper.make_graph(
        nodes,
        "piece",
        [_without_shape(types[name]) for name in inputs],
        [_without_shape(types[name]) for name in outputs],
        [weights[name] for name in used if name in weights],
    )
    piece = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return RunGraph(piece.SerializeToString(), tuple(inputs), tuple(outputs))


def _without_shape(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """The element type alone: the run-time sizes speak for themselves, and a wrong size in a file must not pass."""
    return onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)


def _communicate(node: onnx.NodeProto) -> Communicate:
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    operation = attributes.get("collective_operation", b"").decode()
    reduction = attributes.get("reduce_op", b"").decode()
    sound = {"all_reduce": "sum", "all_gather": "none"}
    if sound.get(operation) != reduction or attributes.get("groups") or attributes.get("group_size", 0):
        raise CheckError(f"collective {_first(node)}: {attributes}; expected a sum or a gather over all ranks")
    return Communicate(operation, node.input[0], node.output[0], int(attributes.get("nb_rank", 0)))
