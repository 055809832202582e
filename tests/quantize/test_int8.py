"""INT8 with SmoothQuant: within the budget, or refused with figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from builders import pipeline
from builders.errors import QualityError
from builders.judging import corpus
from builders.pipeline import Build
from builders.quantize import int8
from builders.quantize.int8 import Weights, _calibrate
from builders.quantize.linears import Group, groups_of, linears_of
from builders.quantize.smoothquant import (
    ALPHAS,
    Calibration,
    QuantizedLinear,
    activation_scale,
    best_smoothing,
    quantize_weight,
    smoothing_factors,
)
from builders.spec import DeploymentSpec
from tests.conftest import tiny_spec

LOOSE = {"min_mean_cosine": 0.9, "min_worst_cosine": 0.5}


@pytest.fixture(scope="module")
def pruned_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output channel holds zeros, another numbers whose scale would be subnormal in fp16."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path_factory.mktemp("pruned") / "bert"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.intermediate.dense.weight"))
    weights[name][5] = 0
    weights[name][6] *= 1e-4 / np.abs(weights[name][6]).max()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def quantised(pruned_bert: Path, root: Path) -> Build:
    spec = tiny_spec(pruned_bert, precision={"cpu": "int8", "calibration_samples": 32, "min_worst_cosine": 0.97})
    return pipeline.build(spec, "cpu", root, "quantize")


def test_the_service_itself_meets_the_budget_or_is_refused(quantised: Build, root: Path) -> None:
    """The graph is within it everywhere; OpenVINO's products of INT8 saturate on a CPU without VNNI."""
    graph = quantised.graph("int8")
    assert graph.operators["QuantizeLinear"] >= 4
    assert graph.quality.mean_cosine >= 0.998
    try:
        served = pipeline.build(quantised.spec, "cpu", root, "qualify").served
    except QualityError as refused:
        said = re.search(r"int8 service of .* \(OpenVINO .*\): mean cosine (0\.\d+) \(budget 0\.998\)", str(refused))
        assert said is not None
        assert float(said[1]) < 0.998
        return
    assert served is not None
    assert "OpenVINO" in served.executor
    assert served.mean_cosine >= 0.998


def test_weights_are_int8_per_channel_and_activations_symmetric(quantised: Build) -> None:
    model = onnx.load(str(quantised.graph("int8").file_path))
    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert initializers[node.input[1]].shape == ()
            assert initializers[node.input[2]] == 0  # TensorRT takes symmetric INT8 only
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            assert initializers[node.input[0]].dtype == np.int8
            assert initializers[node.input[1]].shape == initializers[node.input[0]].shape[1:]
            assert initializers[node.input[1]].dtype == np.float16
            assert initializers[node.input[1]].min() >= np.finfo(np.float16).tiny  # TensorRT refuses zero


def test_tensorrt_builds_the_very_graph_that_openvino_serves(quantised: Build, tmp_path: Path) -> None:
    from builders.engine.tensorrt import build_engine

    graph = quantised.graph("int8")
    engine = build_engine(graph, "tensorrt-rtx", "sm89", quantised.spec.engine.profiles, tmp_path)
    assert engine.precision == "int8"
    assert engine.source_digest == graph.digest


def test_an_impossible_budget_is_refused_with_figures(tiny_bert: Path, tmp_path: Path) -> None:
    spec = tiny_spec(
        tiny_bert,
        precision={"cpu": "int8", "calibration_samples": 16, "min_mean_cosine": 1.0, "min_worst_cosine": 1.0},
    )
    with pytest.raises(QualityError, match=r"only 0 of \d+ groups of matrix products \(0% of their weights\)"):
        pipeline.build(spec, "cpu", tmp_path, "quantize")
    assert not list((tmp_path / "store").glob("quantize/*"))


def test_calibration_texts_come_from_the_users_file(tiny_bert: Path, tmp_path: Path) -> None:
    from builders.errors import InputError

    file = tmp_path / "texts.txt"
    file.write_text("\n".join(corpus.texts(None, 20)))
    spec = tiny_spec(tiny_bert, precision={"cpu": "int8", "calibration_samples": 16, "calibration_texts": str(file)})
    with pytest.raises(InputError, match="20 different texts; expected at least 128"):
        pipeline.build(spec, "cpu", tmp_path, "quantize")


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.6, 1.0]))
def test_smoothing_changes_nothing_before_rounding(seed: int, alpha: float) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(9, 12)).astype(np.float32)
    weight = generator.normal(size=(12, 5)).astype(np.float32)
    factors = smoothing_factors(np.abs(rows).max(axis=0), [weight], alpha)
    assert np.allclose((rows / factors) @ (weight * factors[:, None]), rows @ weight, atol=1e-4)
    quantized = quantize_weight(weight, factors)
    error = np.abs(quantized.weight * quantized.weight_scale - weight * factors[:, None])
    assert (error <= quantized.weight_scale / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("largest", [0.0, 1e-12, 1e-6, 1e-3, 0.3])
def test_scales_are_normal_numbers_of_the_graphs_type(dtype: type[np.floating[Any]], largest: float) -> None:
    """What is rounded with a scale is restored with the very same, whatever the type rounds it to."""
    weight = np.linspace(-largest, largest, 33, dtype=np.float32)[:, None]
    found = quantize_weight(weight, np.ones(33, np.float32), dtype)
    held = found.weight_scale.astype(dtype)
    assert held.min() >= np.finfo(dtype).tiny
    assert np.abs(found.weight * held.astype(np.float32) - weight).max() <= held.astype(np.float32).max() * 0.51
    assert dtype(activation_scale(np.array([largest], np.float32), np.ones(1, np.float32), dtype)) > 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_factors_and_their_inverses_fit_fp16(alpha: float) -> None:
    """A channel that is always zero has a factor of almost nothing, and the graph multiplies by its inverse."""
    channel_max = np.array([0, 1, 1, 1e4], np.float32)
    factors = smoothing_factors(channel_max, [np.array([[1], [1], [0], [1]], np.float32)], alpha)
    for held in (factors.astype(np.float16), (1 / factors).astype(np.float16)):
        assert np.isfinite(held).all()
        assert held.min() >= np.finfo(np.float16).tiny


def test_pooled_vectors_as_wide_as_the_text_is_long_are_not_taken_for_tokens(tmp_path: Path) -> None:
    """[batch, 8] after pooling, where the batch is of 8 tokens: only the names of the dimensions tell."""
    from onnx import TensorProto, helper, numpy_helper

    table, weight = np.eye(8, dtype=np.float32), np.ones((8, 3), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
            helper.make_node("MatMul", ["tokens", "square"], ["mixed"]),
            helper.make_node("ReduceMean", ["mixed", "axis"], ["pooled"], keepdims=0),
            helper.make_node("MatMul", ["pooled", "weight"], ["logits"]),
            helper.make_node("Cast", ["attention_mask"], ["unused"], to=TensorProto.FLOAT),
        ],
        "pooled",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
         for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in
         {"table": table, "square": table, "weight": weight, "axis": np.array([1])}.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), str(tmp_path / "pooled.onnx"))
    mask = np.array([[1, 1, 1, 1, 0, 0, 0, 0]])
    by_token, pooled = _calibrate(tmp_path / "pooled.onnx", [{"input_ids": np.arange(8)[None], "attention_mask": mask}])
    assert by_token.channel_max.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # padding does not count
    assert pooled.channel_max.tolist() == [0.125] * 8


def test_outlier_channels_get_most_of_the_smoothing() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(64, 16)).astype(np.float32)
    rows[:, 3] *= 60
    weight = generator.normal(size=(16, 8)).astype(np.float32)
    calibration = Calibration(np.abs(rows).max(axis=0), rows)
    factors = best_smoothing(calibration, [weight])
    assert factors.argmax() == 3
    plain = activation_scale(calibration.channel_max, np.ones(16, np.float32))
    assert activation_scale(calibration.channel_max, factors) < plain / 4


def test_the_better_rounding_is_taken_and_recorded(quantised: Build, root: Path) -> None:
    choice = quantised.graph("int8").rounding
    assert choice is not None
    assert choice.asked == "auto"
    assert choice.nearest is not None
    assert choice.gptq is not None
    assert choice.texts == 8
    assert choice.taken == ("gptq" if choice.gptq < choice.nearest else "nearest")
    said: list[str] = []
    again = pipeline.build(quantised.spec, "cpu", root, "quantize", lambda stage, message: said.append(message))
    assert again.graph("int8").rounding == choice  # from the store
    assert choice.summary in said[-1]


def _pinned(quantised: Build, rounding: str) -> DeploymentSpec:
    precision = quantised.spec.precision.model_copy(update={"rounding": rounding})
    return quantised.spec.model_copy(update={"precision": precision})


def test_a_spec_pins_one_and_the_graph_is_the_same_node_for_node(quantised: Build, root: Path) -> None:
    nearest, gptq = (
        pipeline.build(_pinned(quantised, each), "cpu", root, "quantize").graph("int8") for each in ("nearest", "gptq")
    )
    for graph, taken in ((nearest, "nearest"), (gptq, "gptq")):
        assert graph.rounding is not None
        assert (graph.rounding.asked, graph.rounding.taken, graph.rounding.texts) == (taken, taken, 0)
    old, new = (onnx.load(str(each.file_path)).graph for each in (nearest, gptq))
    assert list(map(str, old.node)) == list(map(str, new.node))
    before, after = ({item.name: item for item in graph.initializer} for graph in (old, new))
    moved = {name for name in before if before[name] != after[name]}
    assert moved
    assert moved == {name for name in before if name.endswith("_int8")}
    assert quantised.graph("int8").digest in (nearest.digest, gptq.digest)


def _search(quantised: Build, tmp_path: Path, **given: Any) -> tuple[int8._Search, list[Group]]:
    """On the tiny model; a fake puts other weights into its file than GPTQ would."""
    from builders.judging.vectors import sample_requests

    reference, requests = quantised.graph("fp32"), sample_requests(quantised.checkpoint, corpus.texts(None, 16))
    calibrations = int8._calibrate(reference.file_path, requests)
    smoothing, groups = int8._smoothing(reference.file_path, calibrations), groups_of(ir.load(reference.file_path))
    file = tmp_path / "graph.onnx"

    def rewrite(source: Any, taken: Sequence[Group], weights: Weights) -> None:
        members = {member for group in taken for member in group.members}
        int8._rewrite(source.file_path, members, calibrations, smoothing, file, weights)

    budget = quantised.spec.precision.model_copy(update={**LOOSE, **given})
    return int8._Search(reference, quantised.checkpoint, budget, requests, file, rewrite), groups


def test_weights_that_are_no_better_are_not_taken(quantised: Build, tmp_path: Path) -> None:
    search, groups = _search(quantised, tmp_path)
    linears = linears_of(ir.load(quantised.graph("fp32").file_path))
    shapes = [tuple(map(int, node.inputs[1].shape)) for node in linears]  # type: ignore[union-attr, arg-type]
    zeros = {
        index: QuantizedLinear(np.zeros(shape, np.int8), np.ones(shape[1], np.float32))
        for index, shape in enumerate(shapes)
    }
    said: list[str] = []
    weights, choice = search.rounding(groups, lambda groups: zeros, said.append)
    assert weights == {}
    assert choice.taken == "nearest"
    assert choice.gptq is not None
    assert choice.nearest is not None
    assert choice.gptq > choice.nearest
    assert said == [choice.summary]
    assert "weights rounded to the nearest (off by" in said[0]
    pinned, _ = _search(quantised, tmp_path, rounding="gptq")
    assert pinned.rounding(groups, lambda groups: zeros, said.append)[0] is zeros  # as asked; the budget judges it


def test_where_gptq_alone_misses_the_budget_the_nearest_is_written(
    quantised: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration texts that judge may say other than the held-out ones do."""
    found = _quantised(quantised, tmp_path / "free")
    assert found.rounding is not None

    def better_there_and_wrong_here(self: Any, groups: Any, by_gptq: Any, progress: Any) -> Any:
        weights = by_gptq(groups)
        wrong = {index: QuantizedLinear(-each.weight, each.weight_scale) for index, each in weights.items()}
        return wrong, found.rounding.model_copy(update={"taken": "gptq", "nearest": 2.0, "gptq": 1.0})

    monkeypatch.setattr(int8._Search, "rounding", better_there_and_wrong_here)
    kept = _quantised(quantised, tmp_path / "kept")
    assert kept.rounding is not None
    assert kept.rounding.taken == "nearest"
    assert kept.quality.mean_cosine > 0.9
    with pytest.raises(QualityError, match="misses the quality budget"):
        _quantised(quantised, tmp_path / "pinned", rounding="gptq")


def _quantised(quantised: Build, out: Path, **given: Any) -> Any:
    out.mkdir()
    texts = corpus.texts(None, 48)
    budget = quantised.spec.precision.model_copy(update={**LOOSE, **given})
    return int8.quantize_linears(
        quantised.graph("fp16"), quantised.graph("fp32"), quantised.checkpoint, budget, texts[:16], texts[16:], out
    )
