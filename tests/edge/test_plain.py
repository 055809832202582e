"""Operators in plainer ones: the graph computes the same, and a converter that gets them wrong is found out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from builders.edge.plain import write_plain
from builders.errors import UnsupportedError
from builders.graph import OPSET
from runtime.session import open_session

SHAPES = {"q": ["b", 2, "l", 4], "k": ["b", 2, "l", 4], "v": ["b", 2, "l", 4]}


def _graph(file: Path, mask: bool = True, **attributes: object) -> Path:
    """Attention over two heads, then its norm over the last dimension."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    if mask:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["b", 1, "l", "l"]))
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [-1])
    nodes = [
        helper.make_node("Attention", [item.name for item in inputs], ["seen"], **attributes),
        helper.make_node("ReduceL2", ["seen", "axes"], ["norm"], keepdims=0),
    ]
    made = helper.make_tensor_value_info("norm", TensorProto.FLOAT, ["b", 2, "l"])
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [made], [axes]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    onnx.save(model, str(file))
    return file


def test_the_plain_graph_computes_the_same(tmp_path: Path) -> None:
    source, plain = _graph(tmp_path / "g.onnx"), tmp_path / "plain.onnx"
    write_plain(source, plain)
    operators = {node.op_type for node in onnx.load(str(plain)).graph.node}
    assert not operators & {"Attention", "ReduceL2"}
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(3, 2, 5, 4)).astype(np.float32) for name in SHAPES}
    feeds["mask"] = np.arange(5) < np.array([5, 3, 1]).reshape(3, 1, 1, 1) + np.zeros((1, 1, 5, 1))
    found, expected = (open_session(file).run(None, feeds)[0] for file in (plain, source))
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("mask", "attributes"), [(False, {}), (True, {"is_causal": 1}), (True, {"softcap": 2.0})])
def test_an_attention_that_would_come_out_wrong_is_refused(
    tmp_path: Path, mask: bool, attributes: dict[str, object]
) -> None:
    source = _graph(tmp_path / "g.onnx", mask, **attributes)
    with pytest.raises(UnsupportedError, match=r"got an Attention with .*; expected one of a mask"):
        write_plain(source, tmp_path / "plain.onnx")
    assert not (tmp_path / "plain.onnx").exists()
