"""What is refused, in which words, and that nothing half-written stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from builders.errors import CheckError, InputError, UnsupportedError
from builders.partition.cut.shard import load_partition, partition_graph
from builders.partition.cut.solve import solve
from builders.partition.read import read
from tests.partition.plain_graphs import Shape, transformer


def graph(
    file: Path,
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, Any],
    opset: int = 20,
) -> Path:
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in each.items()]
        for each in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, tensors),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("vendor", 1)],
    )
    onnx.save(model, str(file))
    return file


def refused(file: Path, tensor: int = 2, pipeline: int = 1) -> InputError:
    """The error, after checking that the output directory was left alone."""
    out = file.parent / "out"
    with pytest.raises(InputError) as caught:
        partition_graph(file, tensor, pipeline, out)
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert not list(file.parent.glob(".tmp-*"))
    return caught.value


def test_convolutions_have_nothing_to_split(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    file = graph(
        tmp_path / "cnn.onnx", [node], {"x": ["b", 3, 8, 8]}, {"y": ["b", 4, 6, 6]}, {"w": np.ones((4, 3, 3, 3))}
    )
    assert "nothing to split" in str(refused(file))


@pytest.mark.parametrize(("tensor", "fix"), [(3, "tensor=1, 2 or 4"), (8, "tensor=1, 2 or 4")])
def test_ranks_that_do_not_divide_heads_are_told_what_would(tmp_path: Path, tensor: int, fix: str) -> None:
    error = refused(transformer(Shape(heads=4, kv_heads=4, ffn=48), tmp_path / "m.onnx"), tensor)
    assert "4 heads" in error.got  # type: ignore[operator]
    assert fix in error.fix


def test_fewer_kv_heads_than_ranks_that_do_not_divide(tmp_path: Path) -> None:
    error = refused(transformer(Shape(heads=12, kv_heads=3, ffn=48, attention="operator"), tmp_path / "m.onnx"), 4)
    assert "3 heads" in str(error)


def test_too_many_stages(tmp_path: Path) -> None:
    assert "pipeline=" in refused(transformer(Shape(layers=1), tmp_path / "m.onnx"), 1, 90).fix


def test_vendor_operator(tmp_path: Path) -> None:
    node = helper.make_node("Fused", ["x"], ["y"], domain="vendor")
    error = refused(graph(tmp_path / "v.onnx", [node], {"x": ["b", 4]}, {"y": ["b", 4]}, {}))
    assert isinstance(error, UnsupportedError)
    assert "vendor::Fused" in str(error)


def test_control_flow(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    cast = helper.make_node("Cast", ["x"], ["c"], to=TensorProto.BOOL)
    assert "control flow (If)" in str(refused(graph(tmp_path / "i.onnx", [cast, node], {"x": [1]}, {"y": [1]}, {})))


def test_dynamic_weight(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    file = graph(tmp_path / "d.onnx", [node], {"x": ["b", 4], "w": [4, 8]}, {"y": ["b", 8]}, {})
    assert "weight w" in str(refused(file))


def test_old_opset(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    assert "opset 11" in str(refused(graph(tmp_path / "o.onnx", [node], {"x": [1]}, {"y": [1]}, {}, opset=11)))


def test_no_file_and_no_graph(tmp_path: Path) -> None:
    assert "no such file" in str(refused(tmp_path / "absent.onnx"))
    (tmp_path / "text.onnx").write_text("this is no graph, however long it may be")
    assert "text.onnx" in str(refused(tmp_path / "text.onnx"))


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    file, data = transformer(Shape(), tmp_path / "m.onnx"), tmp_path / "m.onnx.data"
    onnx.save(onnx.load(str(file)), str(file), save_as_external_data=True, location=data.name, size_threshold=0)
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "bytes of external data" in str(refused(file))
    data.unlink()
    assert "no file m.onnx.data" in str(refused(file))


def test_output_that_holds_files_is_not_touched(tmp_path: Path) -> None:
    file = transformer(Shape(), tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(InputError, match="files in it"):
        partition_graph(file, 2, 1, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_counts_under_one(tmp_path: Path) -> None:
    assert "tensor=0" in str(refused(transformer(Shape(), tmp_path / "m.onnx"), 0))


def test_sharded_graph_is_not_sharded_again(tmp_path: Path) -> None:
    partition_graph(transformer(Shape(), tmp_path / "m.onnx"), 2, 1, tmp_path / "first")
    assert "collectives" in str(refused(tmp_path / "first" / "stage0.rank0.onnx"))


def test_manifest_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"partition\.json"):
        load_partition(tmp_path)
    (tmp_path / "partition.json").write_text('{"tensor": 2}')
    with pytest.raises(InputError, match=r"partition\.json"):
        load_partition(tmp_path)
    assert not issubclass(InputError, CheckError)


def test_operator_without_a_rule_is_kept_whole_and_said_so(tmp_path: Path) -> None:
    file = transformer(Shape(layers=1), tmp_path / "m.onnx")
    model = onnx.load(str(file))
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Hardmax"  # mixes its last dimension, and has no rule
    onnx.save(model, str(file))
    solution = solve(read(file), 2, "whole")
    assert any("operator Hardmax has no rule" in reason for reason in solution.kept_whole.values())
    assert solution.regions == 1


def test_pooler_and_classifier_stay_whole(tmp_path: Path) -> None:
    """A pair beside the residual stream would cost a third all-reduce."""
    file = transformer(Shape(layers=2, hidden=13, ffn=32), tmp_path / "m.onnx")  # 13: nor may it be asked to divide
    model = onnx.load(str(file))
    weights = {"pool": (13, 13), "classify": (13, 2)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()
    )
    model.graph.node.extend([
        helper.make_node("MatMul", ["hidden", "pool"], ["pooled"]), helper.make_node("Tanh", ["pooled"], ["squashed"]),
        helper.make_node("MatMul", ["squashed", "classify"], ["labels"]),
    ])  # fmt: skip
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["batch", "length", 2]))
    onnx.save(model, str(file))
    partition = partition_graph(file, 2, 1, tmp_path / "out", "whole")
    assert [item.operation for item in partition.stages[0].collectives] == ["all_reduce"] * 4
    assert any("beside the residual stream" in reason for reason in partition.kept_whole.values())


def test_names_come_from_the_graph_alone(tmp_path: Path) -> None:
    """Nodes without names share a transposed weight: names of the copies may not hold where objects lie in memory."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
        helper.make_node("MatMul", ["y", "turned"], ["z"]),
    ]
    file = graph(tmp_path / "g.onnx", nodes, {"x": [2, 4]}, {"z": [2, 4]}, {"w": np.eye(4)})
    sources = [read(file) for _ in range(2)]  # both alive, so that no address serves twice
    names = [[value.name for node in source.graph for value in node.outputs] for source in sources]
    assert names[0] == names[1]
