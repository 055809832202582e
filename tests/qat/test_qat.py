"""Quantisation-aware training: gradients by hand, a graph that comes nearer with the nodes that it had, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from builders import pipeline
from builders.artifacts import OnnxGraph, Quality
from builders.errors import DivergedError, ParityError, QualityError, UnsupportedError
from builders.judging import corpus, vectors
from builders.pipeline import Build
from builders.qat.graph import Int8Product, read_graph
from builders.qat.layer import INT8_ACTIVATION, INT8_WEIGHT, BlockLinear, Int8Linear, LearntScale, rounded
from builders.qat.model import RoundedModel
from builders.qat.train import _require_nearer
from builders.quantize.blocks import compensated, round_to_nearest
from builders.spec import DeploymentSpec, QatSlice
from runtime.proof.judging import cosines
from tests.compress.tiny import Tiny
from tests.conftest import save_tiny, tiny_spec

QAT: dict[str, object] = {"tokens": 4_000, "text_tokens": 4_000, "batch_tokens": 512, "learning_rate": 3e-6}
LOOSE = {"min_mean_cosine": 0.9, "min_worst_cosine": 0.5}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(text[:120] for text in corpus.texts(None, 600)))
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qat")


def _spec(
    source: Path, texts: Path, qat: dict[str, object] | None, task: str = "embedding", cpu: str = "int8"
) -> DeploymentSpec:
    precision = {"cpu": cpu, "calibration_samples": 16, "calibration_texts": str(texts), **LOOSE, "qat": qat}
    precision["rounding"] = "nearest"  # so that there is much to gain
    return tiny_spec(source, task, precision=precision)


@pytest.fixture(scope="module")
def rounded_only(tiny_bert: Path, texts: Path, root: Path) -> Build:
    return pipeline.build(_spec(tiny_bert, texts, None), "cpu", root, "quantize")


@pytest.fixture(scope="module")
def trained(rounded_only: Build, tiny_bert: Path, texts: Path, root: Path) -> Build:
    return pipeline.build(_spec(tiny_bert, texts, QAT), "cpu", root, "quantize")


def _by_hand(values: Any, scale: float, ends: tuple[int, int]) -> tuple[float, float, float]:
    """One value: what it becomes, and the slopes of that in the value and in the scale."""
    steps = values / scale
    if not ends[0] <= steps <= ends[1]:
        end = ends[0] if steps < ends[0] else ends[1]
        return end * scale, 0.0, float(end)
    return round(steps) * scale, 1.0, round(steps) - steps


@pytest.mark.parametrize("ends", [INT8_ACTIVATION, INT8_WEIGHT, (-8, 7)])
def test_gradients_go_straight_through_and_a_scale_has_its_own(ends: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    numbers, rows = (
        random.normal(size=(3, 50)),
        [0.5 / ends[1], 4 / ends[1], 25 / ends[1]],
    )  # the first cuts much off, the last nothing
    values = torch.tensor(numbers, requires_grad=True)
    scale = torch.tensor(rows, dtype=torch.float64)[:, None].requires_grad_()
    weights = torch.tensor(random.normal(size=(3, 50)))
    found = rounded(values, scale, ends)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert scale.grad is not None
    for row, step in enumerate(rows):
        wanted = np.array([_by_hand(value, step, ends) for value in numbers[row]])
        assert np.allclose(found[row].detach().numpy(), wanted[:, 0])
        assert np.allclose(values.grad[row].numpy(), weights[row].numpy() * wanted[:, 1])
        assert np.isclose(float(scale.grad[row]), (weights[row].numpy() * wanted[:, 2]).sum())
    assert (values.grad[0] == 0).any()
    assert (values.grad[2] != 0).all()


def test_a_layer_computes_what_onnx_says_of_its_nodes() -> None:
    """Against the reference implementation of QuantizeLinear and DequantizeLinear."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    random = np.random.default_rng(1)
    given = random.normal(size=(4, 6)).astype(np.float32) * 2
    inverse, activation = random.uniform(0.5, 2, 6).astype(np.float32), np.float32(0.02)
    linear = torch.nn.Linear(6, 5)
    scales = (random.uniform(0.8, 1.2, 5) / 127).astype(np.float32)
    smoothed = (linear.weight.detach().numpy() / inverse).T
    layer = Int8Linear(
        torch.from_numpy(smoothed.T.copy()),
        linear.bias,
        torch.from_numpy(inverse),
        LearntScale(torch.tensor(activation)),
        torch.from_numpy(scales[:, None]),
    )
    zeros = np.zeros(5, np.int8)
    integers = np.clip(np.rint(smoothed / scales), -127, 127).astype(np.int8)
    constants = {"inverse": inverse, "scale": activation, "zero": np.int8(0), "integers": integers, "scales": scales,
                 "zeros": zeros, "bias": linear.bias.detach().numpy()}  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "inverse"], ["smooth"]),
            helper.make_node("QuantizeLinear", ["smooth", "scale", "zero"], ["steps"]),
            helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], ["read"]),
            helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["weight"], axis=1),
            helper.make_node("MatMul", ["read", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 5])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    wanted = ReferenceEvaluator(model).run(None, {"x": given})[0]
    assert np.abs(given * inverse).max() > 127 * activation  # some are cut off
    assert np.allclose(layer(torch.from_numpy(given)).detach().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_in_blocks_computes_what_its_integers_and_scales_say(bits: int) -> None:
    random = np.random.default_rng(3)
    linear = torch.nn.Linear(64, 5)
    weight = linear.weight.detach().numpy().T  # [K, N]
    blocks = round_to_nearest(weight, bits)  # type: ignore[arg-type]
    steps = torch.from_numpy(blocks.values.T.astype(np.float32))
    layer = BlockLinear(steps, linear.bias, torch.from_numpy(blocks.scales.T.copy()), bits)
    given = torch.from_numpy(random.normal(size=(4, 64)).astype(np.float32))
    wanted = given @ torch.from_numpy(blocks.restore()) + linear.bias
    assert torch.allclose(layer(given), wanted, atol=1e-5)
    layer(given).square().sum().backward()  # type: ignore[no-untyped-call]
    for parameter in (layer.weight, layer.scale.change, layer.bias):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_gptq_loses_less_of_the_products_than_rounding_to_the_nearest() -> None:
    random = np.random.default_rng(2)
    given = (random.normal(size=(400, 24)) @ random.normal(size=(24, 24))).astype(np.float32)  # channels that go along
    weight = random.normal(size=(24, 7)).astype(np.float32)
    scales = np.abs(weight).max(axis=0, keepdims=True) / 127
    nearest = np.clip(np.rint(weight / scales), -127, 127)
    found = compensated(weight, given.T @ given, scales, (-127, 127))
    errors = [float(np.square(given @ (weight - steps * scales)).sum()) for steps in (found, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert np.abs(found.astype(int)).max() <= 127


def _losses(built: Build, graph: OnnxGraph) -> NDArray[np.float32]:
    """1 - cosine to fp32 of each held-out text."""
    _, held_out = vectors.calibration_and_held_out(built.spec.precision)
    requests = vectors.sample_requests(built.checkpoint, held_out)
    expected, found = (
        vectors.graph_outputs(each.file_path, requests, built.checkpoint) for each in (built.graph("fp32"), graph)
    )
    losses: NDArray[np.float32] = 1 - cosines(expected, found, by_label=False)
    return losses


@pytest.mark.slow
def test_training_brings_the_graph_nearer_on_texts_that_it_never_saw(rounded_only: Build, trained: Build) -> None:
    before, after = (_losses(built, built.graph("int8")) for built in (rounded_only, trained))
    assert after.mean() < 0.95 * before.mean()
    assert trained.graph("int8").quality.mean_cosine == pytest.approx(1 - after.mean(), abs=1e-5)


@pytest.mark.slow
def test_the_graph_has_the_nodes_that_it_had(rounded_only: Build, trained: Build) -> None:
    old, new = (onnx.load(str(built.graph("int8").file_path)).graph for built in (rounded_only, trained))
    assert [(node.op_type, list(node.input), list(node.output)) for node in new.node] == [
        (node.op_type, list(node.input), list(node.output)) for node in old.node
    ]
    assert rounded_only.graph("int8").operators == trained.graph("int8").operators
    before, after = ({item.name: item for item in graph.initializer} for graph in (old, new))
    assert {name: (item.data_type, item.dims) for name, item in before.items()} == {
        name: (item.data_type, item.dims) for name, item in after.items()
    }
    moved = {name for name in before if before[name] != after[name]}
    products = [item for item in read_graph(trained.graph("int8").file_path).products if isinstance(item, Int8Product)]
    assert {product.names[0] for product in products} <= moved  # scales move by less than fp16 shows, in so few steps
    assert any(name.endswith("LayerNorm.bias") for name in moved)
    assert not any("embeddings.weight" in name for name in moved)
    for product in products:
        assert np.abs(product.integers.astype(int)).max() <= INT8_WEIGHT[1]
        assert product.scales.min() >= np.finfo(np.float16).tiny


@pytest.mark.slow
def test_weights_in_four_bits_are_trained_into_the_nodes_that_they_had(
    tiny_bert: Path, texts: Path, tmp_path: Path
) -> None:
    before, after = (
        pipeline.build(_spec(tiny_bert, texts, asked, cpu="w4"), "cpu", tmp_path, "quantize").graph("w4")
        for asked in (None, QAT)
    )
    old, new = (onnx.load(str(graph.file_path)).graph for graph in (before, after))
    assert [(node.op_type, list(node.input)) for node in new.node] == [
        (node.op_type, list(node.input)) for node in old.node
    ]
    constants = [{item.name: (item.data_type, item.dims) for item in graph.initializer} for graph in (old, new)]
    assert constants[0] == constants[1]
    assert after.quality.mean_cosine > before.quality.mean_cosine


@pytest.mark.slow
def test_scales_that_training_moved_are_the_graphs_and_weights_are_rounded_with_them(rounded_only: Build) -> None:
    from builders.export.weights import load_encoder

    read = read_graph(rounded_only.graph("int8").file_path)
    changed = RoundedModel(load_encoder(rounded_only.checkpoint), read)
    before = changed.arrays()
    for _, layer, _ in changed._int8:
        for scale in (layer.scale, layer.activation):
            scale.change.data += 0.01
    after = changed.arrays()
    for product in (item for item in read.products if isinstance(item, Int8Product)):
        integers, scales, activation = product.names
        assert np.allclose(after[scales] / before[scales], np.exp(0.2), rtol=1e-3)  # as fp16 holds them
        assert after[activation] > before[activation]
        weight = before[integers] * before[scales]
        assert np.abs(after[integers] * after[scales] - weight).max() <= 0.51 * after[scales].max()


@pytest.mark.slow
def test_a_graph_that_training_brought_no_nearer_is_refused(rounded_only: Build) -> None:
    graph = rounded_only.graph("int8")
    assert isinstance(graph.quality, Quality)
    with pytest.raises(QualityError, match=r"mean cosine was 0\.9.* and is 0\.9.*remove precision\.qat"):
        _require_nearer(graph, graph.quality)


@pytest.mark.slow
def test_another_process_finds_it_and_the_page_of_its_losses(trained: Build, root: Path) -> None:
    graph = trained.graph("int8")
    assert "<svg" in (graph.directory / "qat.html").read_text()
    assert [file.name for file in graph.files] == ["graph.onnx"]
    spec = root / "spec.json"
    spec.write_text(trained.spec.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from builders import pipeline\n"
        "from builders.spec import DeploymentSpec\n"
        "spec = DeploymentSpec.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "built = pipeline.build(spec, 'cpu', Path(sys.argv[2]), 'quantize', lambda *said: print(*said))\n"
        "print(built.graph('int8').digest, built.served_graph.precision)"
    )
    arguments = [sys.executable, "-c", code, str(spec), str(root)]
    said = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "int8, trained, cosine" in said
    assert said.count("(unchanged)") == 4
    assert said.splitlines()[-1] == f"{graph.digest} int8"


@pytest.mark.slow
def test_tensorrt_builds_the_trained_graph(trained: Build, tmp_path: Path) -> None:
    from builders.engine.tensorrt import build_engine

    graph = trained.graph("int8")
    engine = build_engine(graph, "tensorrt-rtx", "sm89", trained.spec.engine.profiles, tmp_path)
    assert engine.source_digest == graph.digest


@pytest.mark.slow
def test_training_that_diverges_leaves_the_graph_that_it_began_with(
    rounded_only: Build, tiny_bert: Path, texts: Path, root: Path
) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step|made the model no better"):
        pipeline.build(_spec(tiny_bert, texts, {**QAT, "learning_rate": 10}), "cpu", root, "quantize")
    said: list[str] = []
    again = pipeline.build(rounded_only.spec, "cpu", root, "quantize", lambda stage, message: said.append(message))
    assert again.graph("int8").digest == rounded_only.graph("int8").digest
    assert said[-1].endswith("(unchanged)")
    assert not list((root / "store" / "qat").glob("*"))


@pytest.mark.slow
def test_a_classifiers_scores_are_trained_too(texts: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", "bert", "classification", 3)
    first, second = (
        pipeline.build(_spec(source, texts, asked, "classification"), "cpu", tmp_path, "quantize").graph("int8").quality
        for asked in (None, QAT)
    )
    assert first.logit_error is not None
    assert second.logit_error is not None
    assert second.logit_error < first.logit_error


@pytest.mark.slow
def test_a_graph_of_another_model_is_refused(trained: Build, tmp_path: Path) -> None:
    other = Tiny.of(save_tiny(tmp_path / "other", "bert", seed=1))
    with pytest.raises(ParityError, match=r"a product \[32, 32\] that no layer of the model has"):
        RoundedModel(other.model, read_graph(trained.graph("int8").file_path))
    with pytest.raises(ParityError, match="nothing to train"):
        read_graph(trained.graph("fp16").file_path)


@pytest.mark.slow
def test_models_whose_layers_are_others_are_refused_by_name(texts: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", "distilbert")
    with pytest.raises(UnsupportedError, match=r"precision\.qat: .* got model type distilbert"):
        pipeline.build(_spec(source, texts, QAT), "cpu", tmp_path, "quantize")
    assert not list((tmp_path / "store").glob("quantize/*"))  # before anything was computed


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "minutes or tokens is needed"),
        ({"minutes": 0}, "greater than 0"),
        ({"minutes": float("nan")}, "minutes"),
        ({"tokens": 0}, "greater than 0"),
        ({"minutes": 1, "learning_rate": 0}, "greater than 0"),
        ({"minutes": 1, "batch_tokens": 4}, "greater than or equal to 16"),
        ({"minutes": 1, "student_layers": [0]}, "Extra inputs"),
    ],
)
def test_keys_that_say_nothing_or_nonsense(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QatSlice.model_validate(asked)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"precision": {"cpu": "fp32", "qat": QAT}}, "precision.qat says nothing to precision.cpu=fp32"),
        ({"precision": {"cpu": "bf16", "qat": QAT}}, "precision.qat says nothing to precision.cpu=bf16"),
        ({"model": {"source": "x", "task": "generation"}, "precision": {"qat": QAT}}, "precision.qat=.* says nothing"),
        ({"precision": {"cpu": "w8", "qat": QAT}}, "precision.qat says nothing to precision.cpu=w8"),
        ({"precision": {"cpu": "w4", "rounding": "awq", "qat": QAT}}, "rounding=awq scales weights"),
        ({"compress": [{"qat": QAT}]}, "compress.0.qat"),
        ({"compress": [{"cluster": {}}, {"distil": {"minutes": 1}, "qat": QAT}]}, "compress.1.qat"),
    ],
)
def test_where_nothing_could_be_trained(spec: dict[str, Any], said: str) -> None:
    whole = {"name": "x", "model": {"source": "x", "task": "embedding"}, **spec}
    with pytest.raises(ValueError, match=said):
        DeploymentSpec.model_validate(whole)


def test_a_gpus_int8_is_trained_also_where_the_cpu_serves_another() -> None:
    given = {"cpu": "fp32", "gpu": "int8", "qat": QAT}
    model = {"source": "x", "task": "embedding"}
    assert DeploymentSpec.model_validate({"name": "x", "model": model, "precision": given}).precision.qat is not None
