"""INT8 with SmoothQuant: within the budget, or refused with figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import corpus, pipeline
from builders.errors import QualityError
from builders.pipeline import Build
from builders.quantize.smoothquant import (
    Calibration,
    activation_scale,
    best_smoothing,
    quantize_weight,
    smoothing_factors,
)
from tests.conftest import tiny_spec


@pytest.fixture(scope="module")
def quantised(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    spec = tiny_spec(tiny_bert, precision={"cpu": "int8", "calibration_samples": 32, "min_worst_cosine": 0.97})
    return pipeline.build(spec, "cpu", tmp_path_factory.mktemp("int8"), "qualify")


def test_the_service_itself_meets_the_budget(quantised: Build) -> None:
    graph = quantised.graph("int8")
    assert graph.operators["QuantizeLinear"] >= 4
    assert graph.quality.mean_cosine >= 0.998
    assert quantised.served is not None
    assert "OpenVINO" in quantised.served.executor
    assert quantised.served.mean_cosine >= 0.998


def test_weights_are_int8_per_channel_and_activations_symmetric(quantised: Build) -> None:
    import onnx

    model = onnx.load(str(quantised.graph("int8").file_path))
    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert initializers[node.input[1]].shape == ()
            assert initializers[node.input[2]] == 0  # TensorRT takes symmetric INT8 only
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            assert initializers[node.input[0]].dtype == np.int8
            assert initializers[node.input[1]].shape == initializers[node.input[0]].shape[1:]


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
