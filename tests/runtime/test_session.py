"""ONNX Runtime's INT8 products cannot saturate, whatever the CPU; weights in blocks keep their fused product."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import onnx
import pytest

from runtime.session import open_session
from tests import ROOT
from tests.partition import plain_graphs
from tests.partition.plain_graphs import Shape
from tests.partition.quantised import qdq, weight_only

WHOLE_BLOCKS = Shape(hidden=64, ffn=128, head_dim=16, heads=4, kv_heads=4)


def _as_it_runs(graph: Path, folder: Path, given: Path | bytes | None = None) -> tuple[Counter[str], set[int]]:
    """Operators and element types of weights in the graph that ONNX Runtime made of it."""
    open_session(given or graph, optimized=folder / "optimised.onnx")
    found = onnx.load(str(folder / "optimised.onnx")).graph
    return Counter(node.op_type for node in found.node), {tensor.data_type for tensor in found.initializer}


def test_bytes_are_multiplied_unsigned(tmp_path: Path) -> None:
    """Signed ones add pairs in 16 bits where the CPU has no VNNI."""
    plain = plain_graphs.transformer(Shape(), tmp_path / "m.onnx")
    file = qdq(plain, tmp_path / "q.onnx")
    for given in (file, file.read_bytes()):
        operators, types = _as_it_runs(file, tmp_path, given)
        assert operators["MatMulIntegerToFloat"] > 0
        assert onnx.TensorProto.INT8 not in types


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_blocks_keep_their_fused_product(bits: int, tmp_path: Path) -> None:
    plain = plain_graphs.transformer(WHOLE_BLOCKS, tmp_path / "m.onnx")
    operators, _ = _as_it_runs(weight_only(plain, tmp_path / "w.onnx", bits), tmp_path)
    assert operators["MatMulNBits"] > 0
    assert not operators["DequantizeLinear"]


def test_every_cpu_session_is_opened_in_one_place() -> None:
    opened = {
        path.relative_to(ROOT).as_posix()
        for folder in ("builders", "cluster", "loadtest", "measure", "model_repository", "runtime", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceSession")
    }
    assert opened == {"runtime/session.py"}


def test_what_is_no_graph_is_left_to_the_librarys_error(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    for name in ("empty.onnx", "absent.onnx"):
        with pytest.raises(Exception, match=name):
            open_session(tmp_path / name)
