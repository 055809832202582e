"""Real TensorRT for RTX builds, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import pipeline
from builders.engine.tensorrt import build_engine, compile_plan
from builders.errors import EngineError, MachineError, SpecError
from builders.graph import describe
from builders.pipeline import Build
from builders.spec import ProfileSlice, Range
from tests.conftest import tiny_spec

PROFILES = (ProfileSlice(batch=Range(min=1, opt=2, max=4), length=Range(min=1, opt=16, max=64)),)


@pytest.fixture(scope="module")
def built(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    spec = tiny_spec(tiny_bert, engine={"targets": ["sm80", "sm120"]})
    return pipeline.build(spec, "gpu", tmp_path_factory.mktemp("gpu"), "repository")


def test_one_engine_a_target_with_its_record(built: Build) -> None:
    assert [engine.target for engine in built.engines] == ["sm80", "sm120"]
    for engine in built.engines:
        assert engine.file_path.stat().st_size == engine.bytes > 10_000
        assert engine.source_digest == built.graph("fp16").digest
        assert engine.flavour == "tensorrt-rtx"
        assert engine.profiles == built.spec.engine.profiles


def test_fp32_attention_builds(built: Build, tmp_path: Path) -> None:
    """TensorRT has no fp32 attention kernel: the network must be told that it may be taken apart."""
    assert build_engine(built.graph("fp32"), "tensorrt-rtx", "sm89", PROFILES, tmp_path).bytes > 10_000


def test_an_unknown_target_lists_the_known_ones(built: Build, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"got sm90; .*sm89"):
        build_engine(built.graph("fp16"), "tensorrt-rtx", "sm90", PROFILES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_absent_tensorrt_says_what_to_do(tiny_bert: Path, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt"):
        pytest.skip("full TensorRT is installed here")
    spec = tiny_spec(tiny_bert, engine={"flavour": "tensorrt"})
    with pytest.raises(MachineError, match=r"set engine\.flavour: tensorrt-rtx"):
        pipeline.build(spec, "gpu", tmp_path, "repository")


def _graph(path: Path, nodes: list[object], inputs: list[str]) -> Path:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "g", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), path)
    return path


def test_an_input_that_the_engine_would_ignore_is_an_error(tmp_path: Path) -> None:
    from onnx import helper

    file = _graph(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["x", "ignored"])
    with pytest.raises(EngineError, match="input ignored unused"):
        compile_plan(file, "tensorrt-rtx", "sm89", PROFILES, describe(file)[0])


def test_a_network_that_does_not_parse_is_an_error(tmp_path: Path) -> None:
    from onnx import helper

    file = _graph(tmp_path / "g.onnx", [helper.make_node("NoSuchOperator", ["x"], ["y"])], ["x"])
    with pytest.raises(EngineError, match=r"cannot build g\.onnx for sm89"):
        compile_plan(file, "tensorrt-rtx", "sm89", PROFILES, describe(file)[0])
