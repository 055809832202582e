"""AWQ: factors that cost no operator, found by the error on calibration inputs, and a graph that computes the same."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from builders import pipeline
from builders.artifacts import Checkpoint, OnnxGraph, Quality, WeightRounding
from builders.checkpoint import load_checkpoint
from builders.errors import ParityError, QualityError
from builders.export.decoder import export_decoder
from builders.export.encoder import export_encoder
from builders.judging.perplexity import DecoderSession
from builders.judging.vectors import graph_outputs, sample_requests
from builders.quantize import awq
from builders.quantize.awq import Fold, best_factors, find_folds, write_folded
from builders.quantize.blocks import round_to_nearest
from builders.quantize.encoder_weights import quantize_encoder_weights
from builders.quantize.products import find_products
from builders.quantize.scales import Floats
from builders.quantize.weight_only import WeightWriter, decoder_hessians, quantize_weights, recipe_of
from builders.spec import PrecisionSlice
from tests.conftest import save_tiny, tiny_spec
from tests.generators import TEXTS, generator_checkpoint, save_generator

_LOOSE: dict[str, object] = {"min_mean_cosine": 0.9, "min_worst_cosine": 0.8}
PLACES = {"llama": 4, "gpt2": 2}  # in a layer, and one before the head


def _exported(kind: str, folder: Path) -> tuple[Checkpoint, OnnxGraph]:
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", kind))
    (folder / "graph").mkdir()
    return checkpoint, export_decoder(checkpoint, "fp32", TEXTS, folder / "graph")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, OnnxGraph]:
    return _exported("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, OnnxGraph]:
    folder = tmp_path_factory.mktemp("bert")
    checkpoint = load_checkpoint(tiny_spec(save_tiny(folder / "checkpoint", "bert")).model)
    (folder / "graph").mkdir()
    return checkpoint, export_encoder(checkpoint, "fp32", TEXTS, folder / "graph")


def _logits(file: Path) -> Floats:
    rows = np.random.default_rng(0).integers(4, 400, (2, 9))
    session = DecoderSession(file, 2, 16)
    read, one = np.full(2, 8), np.ones(2, np.int64)
    found = [session.step(np.ascontiguousarray(rows[:, :8]), read)[0], session.step(rows[:, 8:].copy(), one)[0]]
    return np.concatenate(found).astype(np.float32)


def _random_factors(file: Path) -> list[Floats | None]:
    model = ir.load(file)
    products, random = find_products(model), np.random.default_rng(0)
    sizes = [
        products[fold.readers[0]].shape[0] if fold.heads is None else fold.heads[0] * fold.heads[2]
        for fold in find_folds(model, products)
    ]
    return [np.exp(random.standard_normal(size)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("kind", PLACES)
def test_factors_change_numbers_and_neither_nodes_nor_outputs(
    kind: str, llama: tuple[Checkpoint, OnnxGraph], tmp_path: Path
) -> None:
    """Grouped heads, biases, a tied head and both kinds of norm; through the caches."""
    graph = llama[1] if kind == "llama" else _exported(kind, tmp_path)[1]
    factors = _random_factors(graph.file_path)
    assert len(factors) == 2 * PLACES[kind] + 1
    write_folded(graph.file_path, factors, tmp_path / "folded.onnx")
    before, after = (onnx.load(str(file)).graph for file in (graph.file_path, tmp_path / "folded.onnx"))
    assert [node.op_type for node in before.node] == [node.op_type for node in after.node]
    expected, found = _logits(graph.file_path), _logits(tmp_path / "folded.onnx")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(ParityError, match="1 were searched"):
        write_folded(graph.file_path, factors[:1], tmp_path / "wrong.onnx")


def test_an_encoder_has_a_place_behind_its_values_alone(bert: tuple[Checkpoint, OnnxGraph], tmp_path: Path) -> None:
    """Its norms are read by residual sums too, and between its feed-forward products stands a GELU."""
    checkpoint, graph = bert
    model = ir.load(graph.file_path)
    folds = find_folds(model, find_products(model))
    assert [fold.heads is not None for fold in folds] == [True, True]
    write_folded(graph.file_path, _random_factors(graph.file_path), tmp_path / "folded.onnx")
    requests = sample_requests(checkpoint, TEXTS[:8])
    before, after = (graph_outputs(file, requests, checkpoint) for file in (graph.file_path, tmp_path / "folded.onnx"))
    assert np.abs(after - before).max() < 1e-5


def _in_four_bits(weight: Floats) -> Floats:
    return round_to_nearest(weight, 4).restore()


def test_large_channels_are_rounded_finer() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 48)).astype(np.float32)
    inputs = random.standard_normal((500, 64)).astype(np.float32)
    inputs[:, 5] *= 40
    unseen = random.standard_normal((500, 64)).astype(np.float32)
    unseen[:, 5] *= 40
    factors = best_factors(Fold((0,)), [weight], inputs.T @ inputs, _in_four_bits)
    assert factors is not None
    assert factors[5] > 2 * np.delete(factors, 5).max()
    scaled = round_to_nearest(weight * factors[:, None], 4).restore() / factors[:, None]
    loss = [np.linalg.norm(unseen @ (found - weight)) for found in (round_to_nearest(weight, 4).restore(), scaled)]
    assert loss[1] < 0.8 * loss[0]


def test_channels_that_are_always_zero_get_no_wild_factors() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 8)).astype(np.float32)
    inputs = random.standard_normal((100, 64)).astype(np.float32)
    inputs[:, 10:20] = 0
    inputs[:, 3] *= 100
    for hessian in (inputs.T @ inputs, np.zeros((64, 64), np.float32)):
        factors = best_factors(Fold((0,)), [weight], hessian, _in_four_bits)
        assert factors is None or (np.isfinite(factors).all() and factors.min() > 1e-3)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_what_a_spec_pins_is_what_the_graph_holds(
    llama: tuple[Checkpoint, OnnxGraph], method: str, tmp_path: Path
) -> None:  # fmt: skip
    checkpoint, graph = llama
    made = quantize_weights(
        graph, graph, checkpoint, "w4", 1.5, TEXTS[:40], TEXTS[40:], tmp_path, rounding=method  # type: ignore[arg-type]
    )  # fmt: skip
    assert made.rounding == WeightRounding(asked=method, taken=method)  # type: ignore[arg-type]
    assert made.operators["DequantizeLinear"] == 15
    assert {**made.operators, "DequantizeLinear": 0, "Transpose": 0} == {
        **graph.operators, "DequantizeLinear": 0, "Transpose": 0,
    }  # fmt: skip


def test_auto_takes_what_loses_least_on_texts_that_round_nothing(
    llama: tuple[Checkpoint, OnnxGraph], tmp_path: Path
) -> None:
    checkpoint, graph = llama
    made = quantize_weights(graph, graph, checkpoint, "w4", 1.5, TEXTS[:40], TEXTS[40:], tmp_path)
    assert isinstance(made.rounding, WeightRounding)
    losses = made.rounding.losses
    assert set(losses) == {"nearest", "gptq", "awq", "awq+gptq"}
    assert losses[made.rounding.taken] == min(losses.values())
    assert f"awq {losses['awq']:.5g}" in made.judged


def test_factors_that_change_the_model_are_refused(
    llama: tuple[Checkpoint, OnnxGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a graph whose places were found wrongly: here, those of the values are said to be the keys'."""
    file = llama[1].file_path
    rows = np.random.default_rng(0).integers(4, 400, (4, 12))

    class Rows:
        def hessians(self, file: Path, names: Collection[str]) -> dict[str, Floats]:
            return decoder_hessians(file, names, rows)

        def loss(self, file: Path) -> float:
            return 0.0

        def outputs(self, file: Path) -> Floats:
            return _logits(file)

    found = awq.find_folds

    def wrong(model: ir.Model, products: list[awq.Product]) -> list[Fold]:
        return [Fold(fold.readers, None, 1, fold.heads) if fold.heads else fold for fold in found(model, products)]

    monkeypatch.setattr(awq, "find_folds", wrong)
    monkeypatch.setattr(awq, "ALPHAS", np.array([1.0]))
    with pytest.raises(ParityError, match="computes something else"):
        WeightWriter(file, file, Rows(), tmp_path).write(recipe_of(4, "awq"), tmp_path / "out.onnx")


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_weights_of_an_encoder(bert: tuple[Checkpoint, OnnxGraph], tmp_path: Path, precision: str) -> None:
    checkpoint, graph = bert
    budget = PrecisionSlice.model_validate({"cpu": "w4", **_LOOSE})
    arguments = (checkpoint, precision, budget, TEXTS[:32], TEXTS[32:])
    made = quantize_encoder_weights(graph, *arguments, tmp_path)  # type: ignore[arg-type]
    assert isinstance(made.rounding, WeightRounding)
    assert made.operators["DequantizeLinear"] == made.operators["MatMul"]
    assert made.bytes < graph.bytes
    assert set(made.rounding.losses) == (set() if precision == "w8" else {"nearest", "gptq", "awq", "awq+gptq"})
    if precision == "w4":  # as OpenVINO serves it
        served = tiny_spec(checkpoint.directory, precision={"cpu": "w4", **_LOOSE})
        built = pipeline.build(served, "cpu", tmp_path / "build", "qualify")
        assert isinstance(built.served, Quality)
        assert 0.9 < built.served.mean_cosine < 1
        assert built.served_graph.precision == "w4"
    strict = budget.model_copy(update={"min_mean_cosine": 1.0})
    with pytest.raises(QualityError, match=f"{precision} graph of .* misses the quality budget"):
        quantize_encoder_weights(graph, checkpoint, precision, strict, *arguments[3:], tmp_path)  # type: ignore[arg-type]
