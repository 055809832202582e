"""Weights in 8 and 4 bits: the arithmetic, the graph that ONNX Runtime fuses, and the perplexity that decides."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from builders.artifacts import Checkpoint, GenerationQuality, OnnxGraph
from builders.engine.tensorrt import compile_plan
from builders.errors import ParityError, QualityError, UnsupportedError
from builders.export.decoder import export_decoder
from builders.graph import describe, fix_dimension
from builders.quantize.blocks import BLOCK, Bits, BlockForm, Ranges, gptq, round_to_nearest
from builders.quantize.products import WeightRecipe, compensate, find_products, write_quantised
from builders.quantize.weight_only import decoder_hessians, quantize_weights, recipe_of
from builders.spec import ProfileSlice, Range, WeightRounder
from runtime.session import open_session
from tests.generators import TEXTS, generator_checkpoint, save_generator


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(1e-6, 1e4))
def test_rounding_stays_within_half_a_step(bits: Bits, blocks: int, columns: int, seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((blocks * BLOCK, columns)) * size).astype(np.float32)
    found = round_to_nearest(weight, bits)
    steps, error = found.scales.repeat(BLOCK, axis=0), np.abs(found.restore() - weight)
    inside = np.abs(weight) <= steps * (2 ** (bits - 1) - 1)
    assert (error[inside] <= steps[inside] * 0.5001).all()
    assert bits == 4 or inside.mean() > 0.99  # eight bits cut nothing off but by rounding
    assert np.abs(found.values).max() <= 2 ** (bits - 1)
    assert np.linalg.norm(error) < np.linalg.norm(weight) * (0.15 if bits == 4 else 0.01)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from(["minmax", "mse"]), st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_zero_points_stay_within_half_a_step(bits: Bits, ranges: Ranges, seed: int, middle: float) -> None:
    """Wherever the weights of a block lie; 0 is one of its steps."""
    weight = (np.random.default_rng(seed).standard_normal((2 * BLOCK, 5)) + middle).astype(np.float32)
    found = round_to_nearest(weight, bits, form=BlockForm(True, ranges))
    assert found.zeros is not None
    assert found.values.dtype == np.uint8
    assert found.values.max() < 2**bits
    steps, error = found.scales.repeat(BLOCK, axis=0), np.abs(found.restore() - weight)
    if ranges == "minmax":
        assert (error <= steps * 1.01).all()  # half of one, and what the rounded zero point shifts at an end
    even = round_to_nearest(weight, bits, form=BlockForm(False, ranges))
    if abs(middle) > 2:
        assert np.linalg.norm(error) < np.linalg.norm(even.restore() - weight)


def test_ranges_are_what_is_asked_for() -> None:
    """One far weight in a block of four bits: all of it, or the others finer."""
    weight = np.random.default_rng(0).standard_normal((BLOCK, 1)).astype(np.float32)
    weight[0] = 5
    whole, cut, auto = (round_to_nearest(weight, 4, form=BlockForm(False, each)) for each in ("minmax", "mse", "auto"))
    assert np.isclose(whole.restore()[0], 5, rtol=1e-3)
    assert cut.scales < whole.scales
    assert np.array_equal(auto.scales, cut.scales)
    losses = [float(((found.restore() - weight) ** 2).sum()) for found in (whole, cut)]
    assert losses[1] < losses[0]


def test_blocks_of_zeros_stay_zero() -> None:
    weight = np.zeros((2 * BLOCK, 3), np.float32)
    weight[0, 1] = 1
    assert np.array_equal(round_to_nearest(weight, 8).restore(), weight)
    assert np.isfinite(round_to_nearest(weight, 4).restore()).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("largest", [0.0, 1e-7, 1e-4, 1e-2])
def test_scales_of_a_graph_in_fp16_are_normal_numbers_of_it(bits: Bits, largest: float) -> None:
    """A block of zeros, and blocks whose scale would be subnormal: a scale of 0 is refused by TensorRT."""
    weight = np.linspace(-largest, largest, BLOCK * 2, dtype=np.float32).reshape(BLOCK * 2, 1)
    for found in (
        round_to_nearest(weight, bits, BLOCK, np.float16),
        gptq(weight, np.eye(64, dtype=np.float32), bits, np.float16),
    ):
        assert found.scales.min() >= np.finfo(np.float16).tiny
        assert np.array_equal(found.scales, found.scales.astype(np.float16))  # what is rounded is what is restored
        assert np.abs(found.restore() - weight).max() <= found.scales.max() * (0.51 if bits == 8 else 2.5)


def test_gptq_loses_less_on_other_inputs_of_the_kind() -> None:
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((24, 160)) + 0.1  # inputs that hang together, as activations do
    seen, unseen = (
        generator.standard_normal((count, 24)) @ mixing + 0.3 * generator.standard_normal((count, 160))
        for count in (600, 300)
    )
    weight = generator.standard_normal((160, 48)).astype(np.float32)
    plain, better = round_to_nearest(weight, 4), gptq(weight, (seen.T @ seen).astype(np.float32), 4)
    loss = [np.linalg.norm(unseen @ (found.restore() - weight)) for found in (plain, better)]
    assert loss[1] < 0.6 * loss[0]
    assert np.array_equal(plain.scales, better.scales)


def test_gptq_bears_inputs_that_are_always_zero() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((40, 64))
    inputs[:, 10:20] = 0
    weight = generator.standard_normal((64, 8)).astype(np.float32)
    for hessian in ((inputs.T @ inputs).astype(np.float32), np.zeros((64, 64), np.float32)):
        restored = gptq(weight, hessian, 4).restore()
        assert np.abs(restored[10:20] - weight[10:20]).max() < 0.5 * np.abs(weight).max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, OnnxGraph]:
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", "llama"))
    (folder / "graph").mkdir()
    return checkpoint, export_decoder(checkpoint, "fp32", TEXTS, folder / "graph")


def _quantize(exported: tuple[Checkpoint, OnnxGraph], precision: str, ratio: float, out: Path) -> OnnxGraph:
    checkpoint, graph = exported
    return quantize_weights(graph, graph, checkpoint, precision, ratio, TEXTS[:40], TEXTS[40:], out)  # type: ignore[arg-type]


def test_eight_bits_keep_the_perplexity(exported: tuple[Checkpoint, OnnxGraph], tmp_path: Path) -> None:
    graph = _quantize(exported, "w8", 1.005, tmp_path)
    assert isinstance(graph.quality, GenerationQuality)
    assert 0.995 < graph.quality.ratio <= 1.005
    assert (graph.precision, graph.source_digest) == ("w8", exported[1].digest)
    assert graph.operators["DequantizeLinear"] == graph.operators["MatMul"] == 15
    assert (graph.inputs, graph.outputs) == (exported[1].inputs, exported[1].outputs)
    assert graph.bytes < 0.65 * exported[1].bytes


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_onnxruntime_runs_each_product_on_the_integers(
    exported: tuple[Checkpoint, OnnxGraph], precision: str, tmp_path: Path
) -> None:
    file = tmp_path / "graph.onnx"
    write_quantised(exported[1].file_path, recipe_of(int(precision[1]), "nearest"), {}, file)
    open_session(file, optimized=tmp_path / "optimised.onnx")
    fused = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert fused.count("MatMulNBits") == 15
    assert not {"MatMul", "DequantizeLinear"} & set(fused)


@pytest.mark.parametrize(("bits", "method"), [(4, "awq+gptq"), (8, "nearest")])
def test_zero_points_in_a_graph(
    exported: tuple[Checkpoint, OnnxGraph], bits: Bits, method: WeightRounder, tmp_path: Path
) -> None:
    checkpoint, graph = exported
    made = quantize_weights(
        graph, graph, checkpoint, "w8" if bits == 8 else "w4", 1.5, TEXTS[:40], TEXTS[40:], tmp_path, rounding=method,
        form=BlockForm(asymmetric=True),
    )  # fmt: skip
    assert isinstance(made.quality, GenerationQuality)
    assert abs(made.quality.ratio - 1) < (0.005 if bits == 8 else 0.2)
    nodes = [node for node in onnx.load(str(made.file_path)).graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 15
    assert all(len(node.input) == 3 for node in nodes)
    open_session(made.file_path, optimized=tmp_path / "optimised.onnx")
    fused = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert fused.count("MatMulNBits") == 15


def test_the_tied_head_is_quantised_and_the_lookup_is_not(
    exported: tuple[Checkpoint, OnnxGraph], tmp_path: Path
) -> None:
    file = tmp_path / "graph.onnx"
    write_quantised(exported[1].file_path, WeightRecipe("head in 8 bits", 4, 8), {}, file)
    graph = onnx.load(str(file)).graph
    weights = {item.name: item for item in graph.initializer}
    table = next(node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    assert weights[table].data_type == TensorProto.FLOAT
    integers = [weights[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"]
    head = [item for item in integers if tuple(item.dims) == (64, 400)]
    assert [item.data_type for item in head] == [TensorProto.INT8]
    assert {item.data_type for item in integers} == {TensorProto.INT8, TensorProto.INT4}
    scale = next(
        node.input[1] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == head[0].name
    )
    restored = numpy_helper.to_array(head[0]) * numpy_helper.to_array(weights[scale]).repeat(BLOCK, axis=0)
    assert np.abs(restored - numpy_helper.to_array(weights[table]).T).max() < 0.02


def test_four_bits_go_on_to_a_head_in_eight_and_fail_with_all_figures(
    exported: tuple[Checkpoint, OnnxGraph], tmp_path: Path
) -> None:
    with pytest.raises(QualityError) as error:
        _quantize(exported, "w4", 0.5, tmp_path)
    assert re.search(r"tokens \(.*\): ([\w ]+): .*; \1, head in 8 bits: ", str(error.value))


def test_gptq_is_what_the_graph_holds(exported: tuple[Checkpoint, OnnxGraph], tmp_path: Path) -> None:
    import onnx_ir as ir

    source, file = exported[1].file_path, tmp_path / "graph.onnx"
    rows = np.random.default_rng(0).integers(4, 400, (8, 24))
    found = compensate(source, lambda file, names: decoder_hessians(file, names, rows), recipe_of(4, "gptq"))
    assert len(found) == len(find_products(ir.load(source))) == 15
    write_quantised(source, recipe_of(4, "gptq"), found, file)
    held = [numpy_helper.to_array(item).astype(np.int8) for item in onnx.load(str(file)).graph.initializer
            if item.data_type == TensorProto.INT4]  # fmt: skip
    assert all(any(np.array_equal(blocks.values, each) for each in held) for blocks in found.values())
    with pytest.raises(ParityError, match="GPTQ has the weights of 1"):
        write_quantised(source, recipe_of(4, "gptq"), {0: found[0]}, file)


def test_sizes_that_no_block_divides(tmp_path: Path) -> None:
    from onnx import helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 48]) for name in ("x", "y")]
    node, weight = (
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        numpy_helper.from_array(np.eye(48, dtype=np.float32), "w"),
    )
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), tmp_path / "in.onnx")
    with pytest.raises(UnsupportedError, match="in blocks of 32"):
        write_quantised(tmp_path / "in.onnx", recipe_of(8, "nearest"), {}, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_tensorrt_builds_it(exported: tuple[Checkpoint, OnnxGraph], precision: str, tmp_path: Path) -> None:
    write_quantised(exported[1].file_path, recipe_of(int(precision[1]), "nearest"), {}, tmp_path / "graph.onnx")
    (tmp_path / "fixed").mkdir()
    fixed = fix_dimension(tmp_path / "graph.onnx", "capacity", 64, tmp_path / "fixed")
    profile = ProfileSlice(batch=Range(min=1, opt=4, max=8), length=Range(min=1, opt=1, max=1))
    assert len(compile_plan(fixed, "tensorrt-rtx", "sm89", (profile,), describe(fixed)[0]).plan) > 10_000
