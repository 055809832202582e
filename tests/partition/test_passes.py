"""What holds between the passes is found again from the graph, so a pass that breaks its promise is caught there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from builders.errors import CheckError
from builders.partition.cut.localise import COLLECTIVE, LocalGraph, localise
from builders.partition.cut.passes import hold, placements_fit, run_passes, stages_are_whole, sums_are_whole
from builders.partition.cut.solve import Solution, solve
from builders.partition.placement import Block, Partial, Shard
from builders.partition.read import read
from tests.partition.plain_graphs import Shape, transformer


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    return transformer(Shape(hidden=32, ffn=64, head=True, qkv="slices", gate="split"), tmp_path / "plain.onnx")


def _localised(file: Path) -> tuple[LocalGraph, int, list[str]]:
    source = read(file)
    outputs = [str(value.name) for value in source.graph.outputs]
    solution = solve(source, 2, "split")
    partial = sum(isinstance(solution.of(value), Partial) for node in source.graph for value in node.outputs)
    return localise(source, solution), partial, outputs


def test_passes_keep_their_promises(graph_file: Path) -> None:
    local, partial, outputs = _localised(graph_file)
    assert partial > 2
    assert list(sums_are_whole(local, partial, outputs)) == []
    source = read(graph_file)
    again, stages = run_passes(source, solve(source, 2, "split"), 2, "plain")
    assert len(stages) == 2
    assert len(again.collectives) == len(local.collectives)


def _first_sum(local: LocalGraph) -> ir.Node:
    return next(node for node in local.model.graph if node.op_type == COLLECTIVE)


def _drop(local: LocalGraph) -> None:
    join = _first_sum(local)
    join.outputs[0].replace_all_uses_with(join.inputs[0], replace_graph_outputs=True)
    local.model.graph.remove(join, safe=True)


def _pass_by(local: LocalGraph) -> None:
    join = _first_sum(local)
    user, index = next(iter(join.outputs[0].uses()))
    user.replace_input_with(index, join.inputs[0])


def _too_early(local: LocalGraph) -> None:
    join = _first_sum(local)
    local.model.graph.remove(join)
    local.model.graph.insert_before(next(iter(local.model.graph)), [join])


def _no_weight(local: LocalGraph) -> None:
    del local.model.graph.initializers[next(iter(local.weights))]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop, "all-reduces"),
        (_pass_by, "others than its collective see"),
        (_too_early, "used before it is made"),
        (_no_weight, "is not in the graph"),
    ],
)
def test_a_rank_graph_that_breaks_a_promise_is_named(
    graph_file: Path, damage: Callable[[LocalGraph], None], said: str
) -> None:
    local, partial, outputs = _localised(graph_file)
    damage(local)
    with pytest.raises(CheckError, match=said):
        hold("localise", sums_are_whole(local, partial, outputs))


def test_a_slice_beyond_its_tensor_is_named() -> None:
    value = ir.Value(name="w", shape=ir.Shape([4, 6]))
    beyond = Solution(2, {value: Shard(2, (Block(6, 2),))})
    assert list(placements_fit(beyond)) == ["w is cut along dimension 2 of 2"]
    short = Solution(2, {value: Shard(1, (Block(4, 2),))})
    assert list(placements_fit(short)) == ["the blocks of w do not fill its dimension 1 of 6"]


def test_stages_that_lose_or_look_ahead_are_named(graph_file: Path) -> None:
    source = read(graph_file)
    local, stages = run_passes(source, solve(source, 2, "split"), 2, "plain")
    assert list(stages_are_whole(local, stages)) == []
    sent, sender = next(iter(stages[1].inputs.items()))
    stages[sender].sent.remove(sent)
    assert any(f"does not send {sent}" in text for text in stages_are_whole(local, stages))
    stages[sender].sent.append(sent)
    assert any("collective of" in text for text in stages_are_whole(local, stages[:1]))
