"""The two passes that turn a graph into stages of rank graphs, and what holds between them.

Each check is a sentence about the graph alone, found again without what the pass believed. A sentence that does not
hold is a fault of ours: nothing is written then.

    solve ──► localise ──► cut_stages
            │            │            │
            │            │            └ `stages_are_whole`: stages have all of the work, and only look back
            │            └ `sums_are_whole`: nothing but its collective sees a summand; nodes in order; no weight lost
            └ `placements_fit`: slices lie inside their tensors
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from builders.errors import CheckError
from builders.partition.cut.localise import COLLECTIVE, LocalGraph, localise
from builders.partition.cut.solve import Solution
from builders.partition.cut.stages import Stage, cut_stages
from builders.partition.placement import Partial, Shard
from builders.partition.read import Source, shape_of


def run_passes(source: Source, solution: Solution, pipeline: int, name: str) -> tuple[LocalGraph, list[Stage]]:
    """Rewrites the source's graph in place. Raises InputError where it has too few places to cut, CheckError where a
    pass does not keep its promise."""
    partial = sum(isinstance(solution.of(value), Partial) for node in source.graph for value in node.outputs)
    outputs = [str(value.name) for value in source.graph.outputs]
    hold("solve", placements_fit(solution))
    local = localise(source, solution)
    hold("localise", sums_are_whole(local, partial, outputs))
    stages = cut_stages(local, pipeline, name)
    hold("cut_stages", stages_are_whole(local, stages))
    return local, stages


def hold(name: str, faults: Iterable[str]) -> None:
    """Raises CheckError with the first faults."""
    found = list(faults)
    if found:
        raise CheckError(f"{name} broke its promise, which is a fault of Trireme: {'; '.join(found[:3])}")


def placements_fit(solution: Solution) -> Iterable[str]:
    for value, placement in solution.placements.items():
        shape = shape_of(value)
        if not isinstance(placement, Shard) or shape is None:
            continue
        if not 0 <= placement.dim < len(shape):
            yield f"{value.name} is cut along dimension {placement.dim} of {len(shape)}"
        elif isinstance(size := shape[placement.dim], int) and size != sum(block.size for block in placement.blocks):
            yield f"the blocks of {value.name} do not fill its dimension {placement.dim} of {size}"


def sums_are_whole(local: LocalGraph, partial: int, outputs: Sequence[str]) -> Iterable[str]:
    """`partial`: values that were summands before the pass. `outputs`: of the whole graph."""
    graph = local.model.graph
    nodes = list(graph)
    collectives = [node for node in nodes if node.op_type == COLLECTIVE]
    reduced = [node for node in collectives if node.attributes["collective_operation"].as_string() == "all_reduce"]
    if len(reduced) != partial:
        yield f"{partial} summands have {len(reduced)} all-reduces"
    if len(local.collectives) != len(collectives):
        yield f"{len(local.collectives)} collectives are recorded, {len(collectives)} are in the graph"
    for node in collectives:
        value = node.inputs[0]
        if value is None or [user for user, _ in value.uses()] != [node] or value.is_graph_output():
            yield f"others than its collective see the summand {value.name if value is not None else node.name}"
    if [str(value.name) for value in graph.outputs] != list(outputs):
        yield "the graph has other outputs than before"
    made = {*graph.inputs, *graph.initializers.values()}
    for node in nodes:
        yield from (f"{value.name} is used before it is made" for value in node.inputs if value and value not in made)
        made |= set(node.outputs)
    names = Counter(str(value.name) for node in nodes for value in node.outputs if value.name)
    yield from (f"{name} is made twice" for name, count in names.items() if count > 1)
    yield from (f"weight {name} is not in the graph" for name in local.weights if name not in graph.initializers)


def stages_are_whole(local: LocalGraph, stages: Sequence[Stage]) -> Iterable[str]:
    graph = local.model.graph
    given = {str(value.name) for value in graph.inputs}
    ends = Counter(str(value.name) for stage in stages for value in stage.model.graph.outputs)
    for value in graph.outputs:
        makers = [stage for stage in stages if value.name in {out.name for out in stage.model.graph.outputs}]
        if len(makers) != 1 and value.producer() is not None:
            yield f"{len(makers)} stages make the output {value.name}"
    yield from (f"{count} stages send {name}" for name, count in ends.items() if count > 1)
    for stage in stages:
        for value in stage.model.graph.inputs:
            name = str(value.name)
            sender = stage.inputs.get(name)
            if sender is None:
                if name not in given:
                    yield f"nobody sends {name} to stage {stage.index}"
            elif sender >= stage.index or name not in stages[sender].sent:
                yield f"stage {sender} does not send {name} to stage {stage.index}"
    whole = Counter(_joined(graph))
    parts = Counter(name for stage in stages for name in _joined(stage.model.graph))
    yield from (f"{parts[name]} stages have the collective of {name}" for name in whole if parts[name] != 1)


def _joined(graph: ir.Graph) -> Iterable[str]:
    """What collectives make. A stage renames a value that it makes and does not use."""
    return (str(node.outputs[0].name).removesuffix("/sent") for node in graph if node.op_type == COLLECTIVE)
