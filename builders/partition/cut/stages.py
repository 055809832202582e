"""Where the stages of a pipeline begin: cuts on the residual stream, balanced by weights and compute.

A cut is a place in the topological order. What crosses it is every value that is made before and used behind, apart
from light ones (masks, positions, rotary angles): each stage computes those again from the graph's own inputs. The
residual stream alone crosses between the parts of a transformer, so the places where fewest values cross are cuts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from builders.errors import InputError
from builders.partition.cut.localise import LocalGraph
from builders.partition.placement import Shard, local_shape

_LIGHT_BYTES = 1 << 20  # weights that may be loaded again to compute a value again


@dataclass
class Stage:
    """`inputs` names what earlier stages send, with the stage that does; graph inputs are whatever it uses of them."""

    index: int
    model: ir.Model
    inputs: dict[str, int] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    cost: int = 0


def cut_stages(local: LocalGraph, count: int, name: str) -> list[Stage]:
    """Raises InputError where the graph has too few places to cut."""
    nodes = list(local.model.graph)
    costs = [_cost(local, node) for node in nodes]
    heavy = _heavy(local, nodes)
    places = _places(local, nodes, heavy) if count > 1 else []
    starts = choose(costs, places, count)
    if starts is None:
        most = len({sum(costs[:place]) for place in places}) + 1
        raise InputError(
            f"pipeline={count} for {name}",
            got=f"{most - 1} places between blocks where the graph can be cut",
            expected=f"at most {most} stages",
            fix=f"use pipeline={most} or less",
        )
    bounds = [*starts, len(nodes)]
    stage_of = {value: s for s in range(count) for node in nodes[bounds[s] : bounds[s + 1]] for value in node.outputs}
    stages = [_extract(local, s, stage_of, heavy, nodes[bounds[s] : bounds[s + 1]]) for s in range(count)]
    for stage in stages:
        stage.cost = sum(costs[bounds[stage.index] : bounds[stage.index + 1]])
        for value, sender in stage.inputs.items():
            if value not in stages[sender].sent:
                stages[sender].sent.append(value)
    for stage in stages:
        _finish(stage, stage_of)
    return stages


def choose(costs: list[int], places: list[int], count: int) -> list[int] | None:
    """First node of each stage, so that the dearest stage is as cheap as can be; None with too few places.

    Dynamic programme over (stages, places); every stage costs something.
    """
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    ends = [*sorted(places), len(costs)]
    # best[end]: (dearest stage, sum of squares, starts) of the stages that end there
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for stage in range(count):
        found: dict[int, tuple[int, int, list[int]]] = {}
        for end in ends if stage < count - 1 else [len(costs)]:
            for start, (worst, squares, starts) in best.items():
                cost = prefix[end] - prefix[start] if end > start else 0
                candidate = (max(worst, cost), squares + cost * cost, [*starts, start])
                if (cost > 0 or count == 1) and (end not in found or candidate < found[end]):
                    found[end] = candidate
        best = found
    return best[len(costs)][2] if len(costs) in best else None


def _cost(local: LocalGraph, node: ir.Node) -> int:
    """Bytes of weights to hold, and once more for those that are multiplied: a lookup reads one row."""
    total = 0
    for value in node.inputs:
        if value is not None and value.name in local.weights:
            size = _local_bytes(local, str(value.name))
            total += size if node.op_type == "Gather" else 2 * size
    return total


def _local_bytes(local: LocalGraph, name: str) -> int:
    value = local.model.graph.initializers[name]
    tensor, placement = value.const_value, local.weights[name][1]
    assert tensor is not None
    whole = [int(size) for size in tensor.shape.numpy()]
    elements = (
        math.prod(int(size) for size in local_shape(whole, placement))
        if isinstance(placement, Shard)
        else math.prod(whole)
    )
    return math.ceil(elements * tensor.dtype.bitwidth / 8)


def _heavy(local: LocalGraph, nodes: list[ir.Node]) -> set[ir.Value]:
    """Values that are sent rather than computed again: a product with a weight, or much weight, went into them."""
    heavy: set[ir.Value] = set()
    read: dict[ir.Value, dict[str, int]] = {}  # weights behind each light value
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        weights = {str(v.name): _local_bytes(local, str(v.name)) for v in inputs if v.name in local.weights}
        for value in inputs:
            weights |= read.get(value, {})
        product = node.op_type in ("MatMul", "Gemm", "DistCollective", "Attention", "TensorScatter")
        if product or sum(weights.values()) > _LIGHT_BYTES or any(value in heavy for value in inputs):
            heavy.update(node.outputs)
        else:
            read |= dict.fromkeys(node.outputs, weights)
    return heavy


def _places(local: LocalGraph, nodes: list[ir.Node], heavy: set[ir.Value]) -> list[int]:
    """Positions where fewest heavy values cross, and none that ranks hold slices of."""
    position = {node: index for index, node in enumerate(nodes)}
    crossing: list[list[ir.Value]] = [[] for _ in nodes]
    for node in nodes:
        for value in node.outputs:
            last = max((position[user] for user in value.consumers()), default=-1)
            if value in heavy:
                for place in range(position[node] + 1, last + 1):
                    crossing[place].append(value)
    open_places = [
        place for place, values in enumerate(crossing) if values and not any(v.name in local.sharded for v in values)
    ]
    fewest = min((len(crossing[place]) for place in open_places), default=0)
    return [place for place in open_places if len(crossing[place]) == fewest]


def _extract(
    local: LocalGraph, index: int, stage_of: dict[ir.Value, int], heavy: set[ir.Value], own: list[ir.Node]
) -> Stage:
    """A copy of the graph, with what earlier stages send as inputs."""
    graph = local.model.graph.clone()
    stage = Stage(index, ir.Model(graph, ir_version=local.model.ir_version, producer_name="trireme"))
    received = _received(index, stage_of, heavy, own)
    for node in list(graph):
        for value in node.outputs:
            sender = received.get(str(value.name))
            if sender is None:
                continue
            given = ir.Value(name=value.name, shape=value.shape, type=value.type)
            value.name = f"{value.name}/sent"
            value.replace_all_uses_with(given, replace_graph_outputs=True)
            graph.inputs.append(given)
            stage.inputs[str(given.name)] = sender
    return stage


def _received(index: int, stage_of: dict[ir.Value, int], heavy: set[ir.Value], own: list[ir.Node]) -> dict[str, int]:
    """Heavy values of earlier stages that this one needs, by way of light nodes too."""
    found: dict[str, int] = {}
    queue, seen = list(own), set(own)
    while queue:
        for value in queue.pop().inputs:
            producer = value.producer() if value is not None else None
            if value is None or producer is None:
                continue
            if value in heavy and stage_of[value] < index:
                found[str(value.name)] = stage_of[value]
            elif producer not in seen:
                seen.add(producer)
                queue.append(producer)
    return found


def _finish(stage: Stage, stage_of: dict[ir.Value, int]) -> None:
    """Outputs: what is sent on, and the graph outputs that are made here. What serves neither is dropped."""
    from onnx_ir.passes import common

    graph = stage.model.graph
    made = {str(value.name) for value, index in stage_of.items() if index == stage.index}
    values = {str(value.name): value for node in graph for value in node.outputs}
    outputs = [value for value in graph.outputs if value.name in made]
    outputs += [values[name] for name in stage.sent if values[name] not in outputs]
    graph.outputs[:] = outputs
    common.RemoveUnusedNodesPass()(stage.model)
    _measure_own_inputs(graph)
    common.RemoveUnusedNodesPass()(stage.model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]


def _measure_own_inputs(graph: ir.Graph) -> None:
    """Asks the stage's own inputs for sizes: an exporter may read the length of every cache off the last layer's."""
    used = [value for value in graph.inputs if value.uses()]
    measured = [value for value in used if all(node.op_type == "Shape" for node in value.consumers())]
    hosts = {str(dim): (value, index) for value in used if value not in measured
             for index, dim in enumerate(value.shape or ()) if not isinstance(dim, int) and dim.value}  # fmt: skip
    for node in [node for value in measured for node in value.consumers()]:
        given = node.inputs[0]
        assert given is not None
        dims = list(given.shape or ())
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(dims)
        wanted = [hosts.get(str(dim)) for dim in dims[start:end]]
        if len(wanted) == 1 and wanted[0] is not None:
            host, index = wanted[0]
            node.replace_input_with(0, host)
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64("start", index),
                ir.AttrInt64("end", index + 1),
            )
