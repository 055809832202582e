"""Engines of decoders, whole and in ranks: real TensorRT for RTX builds, and the output that greedy steps fetch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from builders.artifacts import GenerationQuality, OnnxGraph, Partition
from builders.engine.rank_manifest import write_rank_manifest
from builders.engine.tensorrt import (
    build_decoder_engine,
    build_decoder_rank_engine,
    build_source_engine,
    decoder_profiles,
)
from builders.engine.top import add_top
from builders.errors import EngineError
from builders.export.decoder import layer_windows, write_graph
from builders.export.seq2seq import write_graphs
from builders.export.weights import load_weights
from builders.graph import record_graph
from builders.partition.cut.shard import partition_graph
from runtime.session import open_session
from runtime.tensorrt.rank_manifest import load_manifest
from tests.generators import POSITIONS, generator_checkpoint, save_generator

PROFILES = decoder_profiles(slots=4, chunk=16)
QUALITY = GenerationQuality(perplexity=1, reference_perplexity=1, tokens=1, executor="none")
VALUES = st.floats(-100, 100, width=32) | st.sampled_from([float("nan"), float("-inf")])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    """A tiny half-precision Llama as the export writes it; its quality has tests of its own."""
    folder = tmp_path_factory.mktemp("decoder")
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", "llama", num_hidden_layers=4))
    model = load_weights(checkpoint)
    (folder / "graph").mkdir()
    assert checkpoint.generation is not None
    windows = layer_windows(model.config, POSITIONS)
    write_graph(model.half(), checkpoint.generation, checkpoint.max_length, windows, folder / "graph" / "graph.onnx")
    return record_graph(folder / "graph", "fp16", QUALITY, checkpoint.digest)


@pytest.fixture(scope="module")
def partition(graph: OnnxGraph, tmp_path_factory: pytest.TempPathFactory) -> Partition:
    return partition_graph(graph.file_path, 2, 2, tmp_path_factory.mktemp("partition"))


def _identity(file: Path, dims: list[int | str], kind: int = TensorProto.FLOAT) -> Path:
    values = [helper.make_tensor_value_info(name, kind, dims) for name in ("x", "logits")]
    model = helper.make_graph([helper.make_node("Identity", ["x"], ["logits"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), file)
    return file


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4), middle=st.booleans())
def test_top_is_the_largest_logit_and_its_token(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], middle: bool
) -> None:
    folder = tmp_path_factory.mktemp("top")
    (folder / "out").mkdir()
    file = add_top(_identity(folder / "g.onnx", ["batch", 1, 5] if middle else ["batch", 5]), folder / "out")
    onnx.checker.check_model(str(file), full_check=True)
    logits = np.array(rows, np.float32)
    session = open_session(file)
    feed = logits[:, None] if middle else logits
    top = session.run(["top"], {"x": feed})[0]
    broken = np.isnan(logits).any(axis=1)
    assert (np.isnan(top[:, 0]) == broken).all()
    assert (top[~broken, 0] == logits[~broken].max(axis=1)).all()
    assert (top[~broken, 1] == logits[~broken].argmax(axis=1)).all()


def test_logits_that_cannot_have_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no float32"):
        add_top(_identity(tmp_path / "half.onnx", ["batch", 5], TensorProto.FLOAT16), tmp_path)
    with pytest.raises(EngineError, match="of 1 to 16777216 tokens"):
        add_top(_identity(tmp_path / "wide.onnx", ["batch", (1 << 24) + 1]), tmp_path)


def test_a_decoder_engine_builds_for_a_fixed_capacity(graph: OnnxGraph, tmp_path: Path) -> None:
    engine = build_decoder_engine(graph, 64, "tensorrt-rtx", "sm89", PROFILES, tmp_path)
    assert engine.file == "model.sm89.64.plan"
    assert (engine.capacity, engine.collectives, engine.profiles) == (64, 0, PROFILES)
    assert engine.file_path.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == [engine.file]


@pytest.mark.slow
def test_both_halves_of_an_encoder_decoder_build(tmp_path: Path) -> None:
    checkpoint = generator_checkpoint(save_generator(tmp_path / "checkpoint", "t5"), "seq2seq")
    (tmp_path / "graph").mkdir()
    write_graphs(load_weights(checkpoint).half(), checkpoint, tmp_path / "graph")
    graph = record_graph(tmp_path / "graph", "fp16", QUALITY, checkpoint.digest, "decoder.onnx")
    decoder = build_decoder_engine(graph, 64, "tensorrt-rtx", "sm89", PROFILES, tmp_path)
    encoder = build_source_engine(graph, "encoder.onnx", 64, "tensorrt-rtx", "sm89", tmp_path)
    assert (decoder.file, encoder.file) == ("model.sm89.64.plan", "model.sm89.encoder.plan")
    assert encoder.profiles[0].length.max == 64
    assert min(decoder.bytes, encoder.bytes) > 10_000


def test_every_rank_of_a_decoder_has_an_engine_and_the_manifest_names_it(partition: Partition, tmp_path: Path) -> None:
    engines = [
        build_decoder_rank_engine(partition, stage, rank, 64, "fp16", "tensorrt-rtx", "sm89", PROFILES, tmp_path)
        for stage in range(2)
        for rank in range(2)
    ]
    for engine in engines:
        assert engine.collectives == len(partition.stages[engine.stage].collectives) > 0
    out = tmp_path / "manifest"
    out.mkdir()
    files = write_rank_manifest(partition, engines, out)
    manifest = load_manifest(files.path("engines.json"))
    assert (manifest.tensor, manifest.pipeline, manifest.vocabulary) == (2, 2, 400)
    assert [rank.files for rank in manifest.ranks] == [{"sm89.64": engine.file} for engine in engines]
    hidden = manifest.ranks[2].received[0]
    assert (hidden.stage, hidden.dims, hidden.itemsize) == (0, ("batch", "length", 64), 2)
    assert [(item.name, item.stage) for item in manifest.ranks[0].sent] == [
        (item.name, 1) for item in manifest.ranks[2].received
    ]
    with pytest.raises(EngineError, match="not the same targets and capacities for every rank"):
        write_rank_manifest(partition, engines[:3], out)
