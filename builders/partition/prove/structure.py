"""A rank's graph as it was written, compared with the one that the plan makes: node by node, and every constant.

Numbers cannot show everything: random inputs miss the last word of a shard, and a norm's epsilon vanishes beside
activations of ordinary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from builders.artifacts import Partition
from builders.errors import CheckError
from builders.partition.cut.shard import PlannedStage
from builders.partition.prove.programs import read_rank

_SHOWN = 3  # differences that are told of one graph


def structure_faults(partition: Partition, planned: Sequence[PlannedStage]) -> list[str]:
    """What the ranks' graphs have otherwise than the plan. Weights of the source are left to `weight_faults`."""
    faults = []
    for stage, plan in zip(partition.stages, planned, strict=False):
        listed = {weight.name for weight in plan.record.weights}
        for rank, name in enumerate(stage.files[: partition.tensor]):
            try:
                found = read_rank(partition.path(name))
                told = list(differences(found, plan.graph(rank), listed, partition.directory))
            except (CheckError, OSError, EOFError, ValueError) as error:  # a graph may claim anything
                faults.append(str(error))
                continue
            faults += [f"{name}: {text}" for text in told[:_SHOWN]]
            if len(told) > _SHOWN:
                faults.append(f"{name}: {len(told) - _SHOWN} more differences from the plan")
    return faults


def differences(found: onnx.ModelProto, planned: onnx.ModelProto, listed: set[str], folder: Path) -> Iterator[str]:
    versions, wanted = ({item.domain: item.version for item in model.opset_import} for model in (found, planned))
    if versions != wanted:
        yield f"operator sets {versions}, the plan {wanted}"
    if found.functions or found.graph.sparse_initializer:
        yield "functions or sparse weights, the plan none"
    yield from _nodes(found.graph, planned.graph)
    for kind in ("input", "output", "value_info"):
        yield from _compare(kind, _values(found.graph, kind), _values(planned.graph, kind), str)
    yield from _compare("constant", _constants(found, listed, folder), _constants(planned, listed, folder), _constant)


def _nodes(found: onnx.GraphProto, planned: onnx.GraphProto) -> Iterator[str]:
    """By the name of the first output, then in their order."""
    have, want = ({_first(node): node for node in graph.node} for graph in (found, planned))
    yield from (f"no {want[name].op_type} that makes {name}" for name in want if name not in have)
    yield from (f"{have[name].op_type} makes {name}, which is not in the plan" for name in have if name not in want)
    for name in want:
        if name in have:
            yield from _node(name, have[name], want[name])
    if len(found.node) != len(have) or (have.keys() == want.keys() and list(have) != list(want)):
        yield "nodes in another order than the plan, or twice"


def _node(name: str, found: onnx.NodeProto, planned: onnx.NodeProto) -> Iterator[str]:
    for what in ("op_type", "domain", "name", "input", "output"):
        have, want = getattr(found, what), getattr(planned, what)
        if have != want:
            yield f"{planned.op_type} {name} has {what} {_plain(have)}, the plan {_plain(want)}"
    have, want = ({item.name: _attribute(item) for item in node.attribute} for node in (found, planned))
    yield from _compare(f"{planned.op_type} {name}: attribute", have, want, str)


def _compare(
    kind: str, found: Mapping[str, Any], planned: Mapping[str, Any], show: Callable[[Any], str]
) -> Iterator[str]:
    for name in [*planned, *(name for name in found if name not in planned)]:
        have, want = found.get(name), planned.get(name)
        if have != want:
            have, want = ("none" if each is None else show(each) for each in (have, want))
            yield f"{kind} {name} is {have}, the plan {want}"


def _attribute(item: onnx.AttributeProto) -> str:
    value = onnx.helper.get_attribute_value(item)
    return str([*value] if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value)


def _values(graph: onnx.GraphProto, kind: str) -> dict[str, str]:
    """Element type and sizes by name."""
    types = {value.name: value.type.tensor_type for value in getattr(graph, kind)}
    return {
        name: f"{onnx.TensorProto.DataType.Name(each.elem_type)} "
        f"{[dim.dim_param or dim.dim_value for dim in each.shape.dim]}"
        for name, each in types.items()
    }


def _constants(model: onnx.ModelProto, listed: set[str], folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, sizes and bytes of every constant; no bytes of those `listed`, which are compared in pieces elsewhere."""
    return {
        tensor.name: (
            onnx.TensorProto.DataType.Name(tensor.data_type),
            tuple(tensor.dims),
            b"" if tensor.name in listed else ir.serde.deserialize_tensor(tensor, base_path=folder).tobytes(),
        )
        for tensor in model.graph.initializer
    }


def _constant(found: tuple[str, tuple[int, ...], bytes]) -> str:
    dtype, dims, content = found
    shown = f" 0x{content[::-1].hex() if len(content) <= 8 else f'{content[:8].hex()}…'}" if content else ""
    return f"{dtype} {list(dims)}{shown}"


def _first(node: onnx.NodeProto) -> str:
    return str(next((name for name in node.output if name), node.name))


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, str) else str(list(value))
