"""One rank's graph: the whole graph with local sizes in its shapes and collectives where sums are partial.

The graph is the same for every rank; ranks differ in the slices of the weights only. Two promises keep it right:
arithmetic on shapes stays in whole sizes (a `Shape` of a cut tensor answers as if it were whole), and every node that
takes sizes of a cut tensor (Reshape, Expand, Split) gets local ones. A partial sum is made whole right behind the
product that makes it, so the bias of a row split is added once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.partition.cut.solve import Solution, token_bytes
from builders.partition.placement import REPLICATE, Partial, Placement, Replicate, Shard, local_shape, spans
from builders.partition.read import Source, constant_array, shape_of

COLLECTIVE = "DistCollective"  # in the default domain: what TensorRT's parser knows


@dataclass(frozen=True)
class Collective:
    """`bytes_per_token` are what a rank sends in a ring."""

    operation: str
    value: str
    bytes_per_token: int


@dataclass
class LocalGraph:
    """`weights` maps each initializer to the tensor in the source file and to its placement; `sharded` names values.

    `by_rank` holds small constants that differ: [rank, ...].
    """

    model: ir.Model
    ranks: int
    weights: dict[str, tuple[str, Placement]] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    inputs: dict[str, Shard] = field(default_factory=dict)
    outputs: dict[str, Shard] = field(default_factory=dict)
    sharded: set[str] = field(default_factory=set)
    by_rank: dict[str, NDArray[Any]] = field(default_factory=dict)


def localise(source: Source, solution: Solution) -> LocalGraph:
    """Rewrites the source's graph in place."""
    graph, local = source.graph, LocalGraph(source.model, solution.ranks)
    sizes = _Sizes(graph)
    for node in list(graph):
        _localise_node(graph, sizes, solution, node)
    _set_local_shapes(solution)
    for value, placement in solution.placements.items():
        if isinstance(placement, Shard):
            if value.is_graph_input():
                local.inputs[str(value.name)] = placement
            if value.is_graph_output() and value not in solution.gathered:
                local.outputs[str(value.name)] = placement
            if value not in solution.gathered:
                local.sharded.add(str(value.name))
    for node in list(graph):
        for value in node.outputs:
            if isinstance(solution.of(value), Partial):
                last = _own_rows(local, solution, node) if node.op_type == "Gather" else node
                local.collectives.append(_all_reduce(graph, last, solution.ranks))
    for value in solution.gathered:
        placement = solution.of(value)
        assert isinstance(placement, Shard)
        local.collectives.append(_all_gather(graph, value, placement, solution.ranks))
    _name_weights(source, solution, local)
    return local


def _localise_node(graph: ir.Graph, sizes: _Sizes, solution: Solution, node: ir.Node) -> None:
    result = solution.of(node.outputs[0])
    data = solution.of(node.inputs[0]) if node.inputs and node.inputs[0] is not None else REPLICATE
    if node.op_type in ("Reshape", "Expand") and isinstance(result, Shard):
        whole = shape_of(node.outputs[0])
        assert whole is not None
        node.replace_input_with(1, sizes.override(node, 1, local_shape(whole, result)))
    elif node.op_type == "Shape" and isinstance(data, Shard):
        sizes.answer_whole(node)
    elif node.op_type == "Split" and isinstance(data, Shard):
        _localise_split(graph, solution, node, data)
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and isinstance(data, Shard):
        _localise_scale_block(node, data)
    elif node.op_type in ("Attention", "RotaryEmbedding") and isinstance(data, Shard):
        _localise_heads(solution, node)


def _localise_split(graph: ir.Graph, solution: Solution, node: ir.Node, data: Shard) -> None:
    rank = len(shape_of(node.outputs[0]) or ())
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if data.dim != axis % rank:
        return
    parts = [local_shape(shape_of(value) or (), solution.of(value))[data.dim] for value in node.outputs]
    node.attributes.pop("num_outputs", None)
    given = _constant(graph, f"{node.outputs[0].name}/sizes", np.array(parts, np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, given)


def _localise_scale_block(node: ir.Node, data: Shard) -> None:
    """A rank that holds less than one block of rows has a shorter block."""
    found, axis = node.attributes.get("block_size"), node.attributes.get("axis")
    rank = len(shape_of(node.inputs[0]) or ()) if node.inputs[0] is not None else 0
    if found is not None and found.as_int() and data.dim == (axis.as_int() if axis else 1) % rank:
        node.attributes["block_size"] = ir.AttrInt64(
            "block_size", min(found.as_int(), *[block.local for block in data.blocks])
        )


def _localise_heads(solution: Solution, node: ir.Node) -> None:
    """Head counts that stand in attributes, for tensors [batch, length, heads * d]."""
    for name, slot in (("q_num_heads", 0), ("kv_num_heads", 1), ("num_heads", 0)):
        value, found = node.inputs[slot], node.attributes.get(name)
        placement = solution.of(value) if value is not None else REPLICATE
        if found is not None and found.as_int() and isinstance(placement, Shard) and placement.dim == 2:
            node.attributes[name] = ir.AttrInt64(name, found.as_int() // placement.blocks[0].parts)


def _set_local_shapes(solution: Solution) -> None:
    for value, placement in solution.placements.items():
        if isinstance(placement, Shard) and value.shape is not None and value not in solution.gathered:
            whole = shape_of(value)
            assert whole is not None
            local = local_shape(whole, placement)
            value.shape = ir.Shape(
                [after if isinstance(after, int) else before for before, after in zip(value.shape, local, strict=True)]
            )


def _own_rows(local: LocalGraph, solution: Solution, node: ir.Node) -> ir.Node:
    """Lets a lookup in some rows of a table give zeros for the rows of other ranks. Returns the node that does.

    An id beyond the whole table, which ONNX forbids, gives zeros too.
    """
    graph, rows, (table, ids) = local.model.graph, node.outputs[0], node.inputs[:2]
    assert table is not None
    assert ids is not None
    placement, name, uses = solution.of(table), str(rows.name), list(rows.uses())
    assert isinstance(placement, Shard)
    kind = (ids.dtype or ir.DataType.INT64).numpy()
    limits = [spans(placement.blocks, rank, local.ranks)[0] for rank in range(local.ranks)]
    first = _constant(graph, f"{name}/first_row", np.array(0, kind))
    local.by_rank[f"{name}/first_row"] = np.array([start for start, _ in limits], kind)
    zero = _constant(graph, f"{name}/row_0", np.array(0, kind))
    count = _constant(graph, f"{name}/row_count", np.array(placement.local, kind))
    nothing = _constant(graph, f"{name}/zero", np.array(0, (rows.dtype or ir.DataType.FLOAT).numpy()))
    last = _constant(graph, f"{name}/axis", np.array([-1], np.int64))
    made: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, like: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        made.append(ir.Node("", operator, inputs, num_outputs=1))
        value = made[-1].outputs[0]
        value.name, value.shape = f"{name}/{operator.lower()}{len(made)}", like.shape
        value.type = ir.TensorType(dtype) if dtype is not None else like.type
        return value

    shifted = add("Sub", ids, first, like=ids)
    above = add("GreaterOrEqual", shifted, zero, like=ids, dtype=ir.DataType.BOOL)
    below = add("Less", shifted, count, like=ids, dtype=ir.DataType.BOOL)
    own = add("And", above, below, like=ids, dtype=ir.DataType.BOOL)
    inside = add("Where", own, shifted, zero, like=ids)
    graph.insert_before(node, made)
    node.replace_input_with(1, inside)
    before = len(made)
    column = add("Unsqueeze", own, last, like=ids, dtype=ir.DataType.BOOL)
    column.shape = ir.Shape([*(ids.shape or ()), 1])
    masked = add("Where", column, rows, nothing, like=rows)
    graph.insert_after(node, made[before:])
    _redirect(graph, rows, masked, uses, rows.is_graph_output())
    rows.name, masked.name = f"{name}/rows", name
    return made[-1]


def _all_reduce(graph: ir.Graph, node: ir.Node, ranks: int) -> Collective:
    """Behind `node`, whose first output is partial. The bias of a Gemm moves behind the sum."""
    value = node.outputs[0]
    name, uses, is_output = str(value.name), list(value.uses()), value.is_graph_output()
    value.name = f"{name}/partial"
    join = _collective(value, "all_reduce", ranks)
    whole, added = join.outputs[0], [join]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        whole.name = f"{name}/sum"
        added += _bias_of_gemm(graph, node, whole, name)
        node.resize_inputs(2)
        whole = added[-1].outputs[0]
        whole.shape, whole.type = value.shape, value.type
    whole.name = name
    graph.insert_after(node, added)
    _redirect(graph, value, whole, uses, is_output)
    return Collective("all_reduce", name, 2 * (ranks - 1) * token_bytes(whole) // ranks)


def _bias_of_gemm(graph: ir.Graph, node: ir.Node, whole: ir.Value, name: str) -> list[ir.Node]:
    """The nodes that add beta * C to the sum."""
    bias, beta = node.inputs[2], node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
    assert bias is not None
    if beta == 1.0:
        return [ir.Node("", "Add", [whole, bias], num_outputs=1)]
    factor = _constant(graph, f"{name}/beta", np.array(beta, (bias.dtype or ir.DataType.FLOAT).numpy()))
    scale = ir.Node("", "Mul", [bias, factor], num_outputs=1)
    _type(scale.outputs[0], f"{name}/bias", list(bias.shape or ()), bias)
    return [scale, ir.Node("", "Add", [whole, scale.outputs[0]], num_outputs=1)]


def _all_gather(graph: ir.Graph, value: ir.Value, placement: Shard, ranks: int) -> Collective:
    """The collective joins along dimension 0, so the cut dimension is brought there and back."""
    node, name = value.producer(), str(value.name)
    assert node is not None
    whole_shape = value.shape
    assert whole_shape is not None
    rank, dim = len(whole_shape), placement.dim
    there = [dim, *(axis for axis in range(rank) if axis != dim)]
    back = [there.index(axis) for axis in range(rank)]
    local = [placement.local if axis == dim else size for axis, size in enumerate(whole_shape)]
    first = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", there)], num_outputs=1)
    _type(first.outputs[0], f"{name}/local_first", [local[axis] for axis in there], value)
    join = _collective(first.outputs[0], "all_gather", ranks)
    joined = join.outputs[0]
    _type(joined, f"{name}/first", [placement.local * ranks, *(whole_shape[axis] for axis in there[1:])], value)
    added = [first, join]
    if placement.local * ranks != whole_shape[dim]:  # the zeros at the end of the last ranks' slices
        bounds = [_constant(graph, f"{name}/{key}", np.array([at], np.int64)) for key, at in _ends(placement)]
        added.append(ir.Node("", "Slice", [joined, *bounds], num_outputs=1))
        joined = added[-1].outputs[0]
        _type(joined, f"{name}/filled", [whole_shape[axis] for axis in there], value)
    last = ir.Node("", "Transpose", [joined], [ir.AttrInt64s("perm", back)], num_outputs=1)
    _type(last.outputs[0], name, list(whole_shape), value)
    value.name, value.shape = f"{name}/local", ir.Shape(local)
    graph.insert_after(node, [*added, last])
    # Nodes of the region go on with the slice; only the graph's output is the whole.
    _redirect(graph, value, last.outputs[0], [], True)
    return Collective("all_gather", name, (ranks - 1) * token_bytes(last.outputs[0]) // ranks)


def _ends(placement: Shard) -> list[tuple[str, int]]:
    """Start, end and axis of the Slice that drops what was filled up."""
    return [("start", 0), ("end", sum(block.size for block in placement.blocks)), ("axis", 0)]


def _collective(value: ir.Value, operation: str, ranks: int) -> ir.Node:
    attributes = [
        ir.AttrString("collective_operation", operation),
        ir.AttrString("reduce_op", "sum" if operation == "all_reduce" else "none"),
        ir.AttrInt64("root", -1),
        ir.AttrInt64("nb_rank", ranks),
        ir.AttrInt64s("groups", []),  # written out: the parser wants the attribute, and empty means all ranks
        ir.AttrInt64("group_size", 0),
    ]
    node = ir.Node("", COLLECTIVE, [value], attributes, num_outputs=1)
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node


def _type(value: ir.Value, name: str, sizes: Sequence[int | str | ir.SymbolicDim], like: ir.Value) -> None:
    value.name, value.shape, value.type = name, ir.Shape(sizes), like.type


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value, uses: Sequence[tuple[ir.Node, int]], output: bool) -> None:
    for user, index in uses:
        user.replace_input_with(index, new)
    if output:
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


class _Sizes:
    """Shape inputs with local sizes, each written once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[object, tuple[int | str, ...]], ir.Value] = {}

    def override(self, node: ir.Node, index: int, sizes: Sequence[int | str]) -> ir.Value:
        """The shape input of `node` with the static entries of `sizes` in place of its own."""
        given = node.inputs[index]
        assert given is not None
        array = constant_array(given)
        key = (given if array is None else array.tobytes(), tuple(s if isinstance(s, int) else "" for s in sizes))
        if key not in self._made:
            self._made[key] = self._build(node, given, array, sizes)
        return self._made[key]

    def _build(
        self,
        node: ir.Node,
        given: ir.Value,
        array: NDArray[Any] | None,
        sizes: Sequence[int | str],
    ) -> ir.Value:
        name = f"{node.outputs[0].name}/local_shape"
        fixed = np.array([isinstance(size, int) for size in sizes])
        local = np.array([size if isinstance(size, int) else -1 for size in sizes], np.int64)
        if array is not None or fixed.all():
            return _constant(self._graph, name, local if array is None else np.where(fixed, local, array.reshape(-1)))
        producer = given.producer()
        assert producer is not None
        lengths = [shape_of(value) for value in producer.inputs if value is not None]
        if producer.op_type == "Concat" and all(length is not None and length == (1,) for length in lengths):
            parts = [
                _constant(self._graph, f"{name}.{at}", local[at : at + 1]) if fixed[at] else value
                for at, value in enumerate(producer.inputs)
            ]
            made = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)], num_outputs=1)
        else:
            made = self._where(name, fixed, local, given)
        _type(made.outputs[0], name, [len(sizes)], given)
        self._graph.insert_after(producer, made)
        return made.outputs[0]

    def _where(self, name: str, fixed: NDArray[Any], sizes: NDArray[Any], given: ir.Value) -> ir.Node:
        chosen = _constant(self._graph, f"{name}/fixed", fixed)
        return ir.Node("", "Where", [chosen, _constant(self._graph, f"{name}/sizes", sizes), given], num_outputs=1)

    def answer_whole(self, node: ir.Node) -> None:
        """Lets a Shape of a cut tensor answer with whole sizes."""
        whole = shape_of(node.inputs[0]) if node.inputs[0] is not None else None
        assert whole is not None
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(whole)
        sizes = whole[start:end]
        value = node.outputs[0]
        uses = list(value.uses())
        fixed = np.array([isinstance(size, int) for size in sizes])
        made = self._where(
            f"{value.name}/whole", fixed, np.array([s if isinstance(s, int) else -1 for s in sizes], np.int64), value
        )
        _type(made.outputs[0], f"{value.name}/whole", [len(sizes)], value)
        self._graph.insert_after(node, made)
        _redirect(self._graph, value, made.outputs[0], uses, value.is_graph_output())


def _name_weights(source: Source, solution: Solution, local: LocalGraph) -> None:
    """One initializer for each weight and placement, named as in the file unless a weight is placed in two ways."""
    chosen: dict[tuple[str, Placement], ir.Value] = {}
    for value, origin in source.origin.items():
        if not value.uses() and not value.is_graph_output():
            continue
        placement = solution.of(value)
        key = (origin, placement)
        if key not in chosen:
            chosen[key] = value
        else:
            value.replace_all_uses_with(chosen[key], replace_graph_outputs=True)
    graph = source.graph
    for value in [value for value in graph.initializers.values() if value in source.origin]:
        del graph.initializers[str(value.name)]
    taken = set(graph.initializers)
    for (origin, placement), value in sorted(chosen.items(), key=lambda item: not isinstance(item[0][1], Replicate)):
        name, count = origin, 0
        while name in taken:
            count += 1
            name = f"{origin}/placed{count}"
        taken.add(name)
        value.name = name
        graph.register_initializer(value)
        local.weights[name] = (origin, placement)
