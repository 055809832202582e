"""INT8 with the scales of each run, and FP8: what the graphs hold, who computes them, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from builders import pipeline
from builders.engine.tensorrt import compile_plan
from builders.errors import InputError, SpecError
from builders.graph import OPSET, describe
from builders.pipeline import Build, one_file
from builders.quantize.forms import FORMS, Site
from builders.quantize.linears import linears_of
from builders.spec import ModelSlice, PrecisionSlice, ProfileSlice, Range
from runtime.session import multiplies_bytes, open_session
from tests.conftest import tiny_spec

ON_ONNXRUNTIME = {"executor": "onnxruntime"}
FEW = {"calibration_samples": 32, "min_worst_cosine": 0.97}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def dynamic(tiny_bert: Path, root: Path) -> Build:
    spec = tiny_spec(tiny_bert, precision={"cpu": "dynamic_int8", **FEW}, serving=ON_ONNXRUNTIME)
    return pipeline.build(spec, "cpu", root, "qualify")


@pytest.fixture(scope="module")
def fp8(tiny_bert: Path, root: Path) -> Build:
    spec = tiny_spec(tiny_bert, precision={"gpu": "fp8", **FEW}, engine={"targets": ["sm89", "sm120"]})
    return pipeline.build(spec, "gpu", root, "engine")


def _linear(file: Path, weight: np.ndarray) -> ir.Model:  # type: ignore[type-arg]
    """x [rows, K] @ weight."""
    size = list(weight.shape)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])]
        for name, width in zip("xy", size, strict=True)
    )
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), str(file))
    return ir.load(file)


def _computed(precision: str, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """x, weight, smoothing, and what ONNX Runtime makes of the product in a form."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(1, 2, (7, 16)).astype(np.float32), rng.normal(size=(16, 5)).astype(np.float32)
    factors, form = rng.uniform(0.5, 2, 16).astype(np.float32), FORMS[precision]
    model = _linear(folder / "g.onnx", weight)
    (node,) = linears_of(model)
    site = Site(model.graph, node)
    form.product(site, node, form.activation(site, factors, np.abs(x).max(axis=0)), factors, None)
    ir.save(model, folder / "q.onnx")
    return x, weight, factors, open_session(folder / "q.onnx").run(None, {"x": x})[0]


def test_dynamic_int8_is_the_arithmetic_of_the_standard(tmp_path: Path) -> None:
    x, weight, factors, found = _computed("dynamic_int8", tmp_path)
    smoothed, wide = x / factors, weight * factors[:, None]
    low, high = min(smoothed.min(), 0), max(smoothed.max(), 0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    activation = np.clip(np.rint(smoothed / scale) + zero, 0, 255) - zero
    scales = np.abs(wide).max(axis=0) / 127
    expected = (activation @ np.rint(wide / scales)) * scale * scales
    assert np.allclose(found, expected, atol=0.05)  # a step where a number lies in the middle of two
    assert np.abs(found - x @ weight).max() > 1e-3  # it is quantised at all


def test_fp8_is_rounded_as_e4m3_is(tmp_path: Path) -> None:
    x, weight, _, found = _computed("fp8", tmp_path)

    def rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        made: np.ndarray = (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale  # type: ignore[type-arg]
        return made

    expected = rounded(x, np.abs(x).max() / 448) @ rounded(weight, np.abs(weight).max(axis=0) / 448)
    assert np.allclose(found, expected, atol=1e-3)
    assert np.abs(found - x @ weight).max() > 1e-2


def test_onnx_runtime_serves_dynamic_int8_as_products_of_bytes(dynamic: Build, tmp_path: Path) -> None:
    graph = dynamic.graph("dynamic_int8")
    assert graph.operators["MatMulInteger"] > graph.operators["DynamicQuantizeLinear"] >= 4
    assert dynamic.served is not None
    assert dynamic.served.executor.startswith("ONNX Runtime")
    assert dynamic.served.mean_cosine >= 0.998
    open_session(graph.file_path, optimized=tmp_path / "fused.onnx")
    run = onnx.load(str(tmp_path / "fused.onnx")).graph
    fused = [node.op_type for node in run.node]
    assert "MatMulInteger" not in fused
    assert {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"} & set(fused)
    # Products of signed bytes saturate without VNNI, and are faster with it.
    assert (TensorProto.INT8 in {tensor.data_type for tensor in run.initializer}) == multiplies_bytes()


def test_without_vnni_dynamic_products_are_of_unsigned_bytes(
    dynamic: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.session.multiplies_bytes", lambda: False)
    open_session(dynamic.graph("dynamic_int8").file_path, optimized=tmp_path / "fused.onnx")
    run = onnx.load(str(tmp_path / "fused.onnx")).graph
    assert TensorProto.INT8 not in {tensor.data_type for tensor in run.initializer}


def test_fp8_builds_for_every_gpu_that_has_it(fp8: Build) -> None:
    assert [engine.target for engine in fp8.engines] == ["sm89", "sm120"]
    assert all(engine.precision == "fp8" and engine.bytes > 10_000 for engine in fp8.engines)
    graph = fp8.graph("fp8")
    assert graph.quality.mean_cosine >= 0.998  # type: ignore[union-attr]
    assert graph.opset >= 19  # the first with FP8
    model = onnx.load(str(graph.file_path))
    tensors = {item.name: item for item in model.graph.initializer}
    zeros = [
        tensors[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert zeros
    assert {item.data_type for item in zeros} == {TensorProto.FLOAT8E4M3FN}
    weights = [item for item in tensors.values() if item.data_type == TensorProto.FLOAT8E4M3FN and len(item.dims) == 2]
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in {item.name for item in weights}:
            assert list(tensors[node.input[1]].dims) == list(tensors[node.input[0]].dims)[1:]


def test_fp8_ranks_build_too(fp8: Build, root: Path) -> None:
    spec = fp8.spec.model_copy(update={"parallel": fp8.spec.parallel.model_copy(update={"pipeline": 2})})
    built = pipeline.build(spec, "gpu", root, "engine")
    assert [(engine.stage, engine.target) for engine in built.engines] == [
        (0, "sm89"), (1, "sm89"), (0, "sm120"), (1, "sm120"),
    ]  # fmt: skip


def test_an_old_gpu_is_refused_by_name(fp8: Build) -> None:
    graph = fp8.graph("fp8").file_path
    profile = ProfileSlice(batch=Range(min=1, opt=2, max=4), length=Range(min=1, opt=16, max=64))
    with pytest.raises(SpecError, match=r"got sm86 for graph.onnx, a graph in FP8; expected sm89 or newer"):
        compile_plan(graph, "tensorrt-rtx", "sm86", (profile,), describe(graph)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": {"gpu": "fp8"}, "engine": {"targets": ["sm80", "sm89"]}}, "sm89 or newer, and sm80 does not"),
        ({"precision": {"gpu": "fp8", "rounding": "gptq"}}, "rounding says nothing to"),
        ({"precision": {"cpu": "dynamic_int8"}}, "needs serving.executor=onnxruntime"),
        ({"precision": {"cpu": "dynamic_int8"}, "serving": {"executor": "openvino"}}, "needs serving.executor"),
        ({"precision": {"cpu": "dynamic_int8"}, "parallel": {"tensor": 2}}, "does not go with parallel"),
        ({"precision": {"cpu": "dynamic_int8", "qat": {"minutes": 1}}, "serving": ON_ONNXRUNTIME}, "qat says nothing"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(changes: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tiny_spec(Path("m"), **changes)


def test_a_graph_in_fp16_has_no_dynamic_form(fp8: Build, tiny_bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    graph = fp8.graph("fp16")
    source.write_bytes(graph.file_path.read_bytes())
    model = ModelSlice(source=str(tiny_bert), task="embedding", pooling="mean", max_length=64)
    files = [{**item.model_dump(), "name": "m.onnx"} for item in graph.files]
    moved = one_file.OnnxGraph.model_validate(
        {**graph.model_dump(), "directory": tmp_path, "file": "m.onnx", "files": files}
    )
    source.with_name("m.onnx.json").write_text(one_file.Sidecar(model=model, graph=moved).model_dump_json())
    with pytest.raises(InputError, match=r"a graph in fp16 for --scheme dynamic_int8; expected fp32"):
        one_file.quantize(source, "dynamic_int8", PrecisionSlice(), tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()
