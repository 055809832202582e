"""Placements, the rules of operators and the choice of stages: arithmetic, without files or processes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from builders.artifacts import Cut
from builders.partition.cut.stages import choose
from builders.partition.placement import PARTIAL, REPLICATE, Block, Placement, Shard, even, local_shape, spans
from builders.partition.prove.verify import cut_array
from builders.partition.rules.op import OUT, Illegal, Op
from builders.partition.rules.table import rule_for


def test_ranks_hold_their_part_of_each_block() -> None:
    blocks = (Block(8, 4), Block(4, 2), Block(2, 1))
    assert spans(blocks, 0, 4) == [(0, 2), (8, 10), (12, 14)]
    assert spans(blocks, 1, 4) == [(2, 4), (8, 10), (12, 14)]
    assert spans(blocks, 3, 4) == [(6, 8), (10, 14)]


def test_parts_of_all_ranks_are_the_whole() -> None:
    for parts in (1, 2, 4):
        held = [
            index for rank in range(4) for low, high in spans((Block(8, parts),), rank, 4) for index in range(low, high)
        ]
        assert sorted(held) == sorted(list(range(8)) * (4 // parts))


def test_last_pieces_of_an_odd_size_are_short() -> None:
    assert [spans((Block(5, 4),), rank, 4) for rank in range(4)] == [[(0, 2)], [(2, 4)], [(4, 5)], [(5, 5)]]
    assert local_shape([5], even(0, 5, 4)) == [2]


def test_local_shape_counts_blocks() -> None:
    assert local_shape(["batch", 14, 3], Shard(1, (Block(8, 4), Block(4, 2), Block(2, 1)))) == ["batch", 6, 3]
    assert local_shape([4], PARTIAL) == [4]


def test_cut_array_takes_the_rank_s_part() -> None:
    array = np.arange(8).reshape(2, 4)
    assert cut_array(array, Cut(dim=1, blocks=((2, 2), (2, 2))), 1, 2).tolist() == [[1, 3], [5, 7]]
    assert cut_array(array, None, 1, 2) is array


def op(
    kind: str,
    inputs: list[list[int | str]],
    outputs: list[list[int | str]],
    known: dict[int, Placement] | None = None,
    **attributes: object,
) -> Op:
    node = ir.node(
        kind,
        [ir.val(f"i{n}", ir.DataType.FLOAT, shape) for n, shape in enumerate(inputs)],
        attributes,
        num_outputs=len(outputs),
    )  # type: ignore[arg-type]
    for value, shape in zip(node.outputs, outputs, strict=True):
        value.shape = ir.Shape(shape)
    return Op(node, 2, known or {}, frozenset({1}))


@pytest.mark.parametrize(
    ("before", "shard", "after", "expected"),
    [
        (["b", "s", 4, 8], even(2, 4, 2), ["b", "s", 32], even(2, 32, 2)),
        (["b", "s", 32], even(2, 32, 2), ["b", "s", 4, 8], even(2, 4, 2)),
        (["b", "s", 3, 4, 8], even(3, 4, 2), ["b", "s", 96], Shard(2, (Block(32, 2),) * 3)),
        (["b", "s", 96], Shard(2, (Block(32, 2),) * 3), ["b", "s", 3, 4, 8], even(3, 4, 2)),
        (["s", 64], Shard(1, (Block(32, 2), Block(16, 2), Block(16, 2))), ["s", 8, 8],
         Shard(1, (Block(4, 2), Block(2, 2), Block(2, 2)))),
        (["b", "s", 32], even(2, 32, 2), ["b", "s", 1, 32], even(3, 32, 2)),
        (["n", 32], even(1, 32, 2), ["b", "s", 32], even(2, 32, 2)),
        (["b", 4, "s", 8], even(1, 4, 2), ["b", 4, 1, "s", 8], even(1, 4, 2)),
    ],
)  # fmt: skip
def test_reshape_carries_a_cut(before: list[int | str], shard: Shard, after: list[int | str], expected: Shard) -> None:
    rule = rule_for("Reshape")
    assert rule is not None
    assert rule(op("Reshape", [before, [len(after)]], [after]), 0, shard) == {0: shard, OUT: expected, 1: REPLICATE}
    assert rule(op("Reshape", [before, [len(after)]], [after]), OUT, expected) == {
        0: shard,
        OUT: expected,
        1: REPLICATE,
    }


def test_reshape_that_tears_heads_apart_is_illegal() -> None:
    rule = rule_for("Reshape")
    assert rule is not None
    with pytest.raises(Illegal):
        rule(op("Reshape", [["b", 4, "s", 8], [3]], [["x", "s", 8]]), 0, even(1, 4, 2))


def test_matmul_columns_and_rows() -> None:
    rule = rule_for("MatMul")
    assert rule is not None
    product = op("MatMul", [["b", "s", 8], [8, 16]], [["b", "s", 16]])
    assert rule(product, OUT, even(2, 16, 2)) == {0: REPLICATE, 1: even(1, 16, 2), OUT: even(2, 16, 2)}
    assert rule(product, 0, even(2, 8, 2)) == {0: even(2, 8, 2), 1: even(0, 8, 2), OUT: PARTIAL}


def test_product_of_activations_is_never_contracted() -> None:
    rule = rule_for("MatMul")
    assert rule is not None
    product = op("MatMul", [["b", 4, "s", 8], ["b", 4, 8, "s"]], [["b", 4, "s", "s"]])
    heads = Op(product.node, 2, {}, frozenset())
    assert rule(heads, 0, even(1, 4, 2)) == {0: even(1, 4, 2), 1: even(1, 4, 2), OUT: even(1, 4, 2)}
    with pytest.raises(Illegal, match="two activations"):
        rule(heads, 0, even(3, 8, 2))


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("Softmax", {"axis": -1}), ("LayerNormalization", {"axis": -1}), ("ReduceMean", {"axes": [-1]})],
)
def test_what_mixes_a_dimension_may_not_be_cut_along_it(kind: str, attributes: dict[str, object]) -> None:
    rule = rule_for(kind)
    assert rule is not None
    with pytest.raises(Illegal, match="over the cut dimension"):
        rule(op(kind, [["b", "s", 8]], [["b", "s", 8]], **attributes), 0, even(2, 8, 2))


def test_broadcast_operands_stay_whole() -> None:
    rule = rule_for("Mul")
    assert rule is not None
    product = op("Mul", [["b", 4, "s", 8], ["b", 1, "s", 8]], [["b", 4, "s", 8]])
    assert rule(product, 0, even(1, 4, 2)) == {0: even(1, 4, 2), 1: REPLICATE, OUT: even(1, 4, 2)}


def test_split_waits_for_all_parts() -> None:
    rule = rule_for("Split")
    assert rule is not None
    inputs, outputs = [["b", 12], [3]], [["b", 4]] * 3
    assert rule(op("Split", inputs, outputs, {OUT: even(1, 4, 2)}, axis=1), OUT, even(1, 4, 2)) is None
    known: dict[int, Placement] = {-1: even(1, 4, 2), -2: REPLICATE, -3: even(1, 4, 2)}
    found = rule(op("Split", inputs, outputs, known, axis=1), OUT, even(1, 4, 2))
    assert found is not None
    assert found[0] == Shard(1, (Block(4, 2), Block(4, 1), Block(4, 2)))


def test_scales_follow_their_weights() -> None:
    rule = rule_for("DequantizeLinear")
    assert rule is not None
    channel = op("DequantizeLinear", [[8, 16], [16], [16]], [[8, 16]], axis=1)
    assert rule(channel, OUT, even(1, 16, 2))[1] == even(0, 16, 2)  # type: ignore[index]
    assert rule(channel, OUT, even(0, 8, 2))[1] == REPLICATE  # type: ignore[index]
    block = op("DequantizeLinear", [[128, 16], [4, 16]], [[128, 16]], axis=0, block_size=32)
    assert rule(block, OUT, even(0, 128, 2))[1] == even(0, 4, 2)  # type: ignore[index]
    assert rule(block, OUT, even(1, 16, 2))[1] == even(1, 16, 2)  # type: ignore[index]


def test_stages_are_balanced() -> None:
    assert choose([4, 1, 1, 1, 1], [1, 2, 3, 4], 2) == [0, 1]
    assert choose([1] * 9, list(range(1, 9)), 3) == [0, 3, 6]
    assert choose([1, 1], [1], 3) is None
    assert choose([0, 0, 5], [1, 2], 2) is None
    assert choose([7], [], 1) == [0]
