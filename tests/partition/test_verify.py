"""Partitions run as real processes, and their numbers are those of the whole graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders.errors import InputError
from builders.partition.cut.shard import load_partition, partition_graph
from builders.partition.cut.solve import Embeddings
from builders.partition.prove.verify import verify_partition
from runtime.ranks.group import RankGroup
from tests.partition import exported, plain_graphs, running
from tests.partition.plain_graphs import Shape
from tests.partition.quantised import qdq, weight_only, words
from tests.partition.running import GRAPHS, Graphs, proven

QUICK = ("gpt2", "llama", "t5_decoder", "legacy_gpt2_cached")
SLOW = tuple(name for name in GRAPHS if name not in QUICK)
LAYOUTS: tuple[tuple[int, int, Embeddings], ...] = (
    (2, 1, "whole"), (4, 1, "split"), (2, 2, "whole"), (2, 2, "split"), (1, 3, "whole"),
)  # fmt: skip
graphs, groups, group = running.graphs, running.groups, running.group


def check_architecture(name: str, graphs: Graphs, out: Path, group: RankGroup) -> None:
    """Every layout of one architecture: two all-reduces a block (three with cross attention), one gather.

    A split table of words takes one all-reduce more.
    """
    file = graphs(name)
    headless = ("bert", "roberta", "distilbert", "t5_encoder", "llama_wide", "legacy_bert")
    head = {} if name in headless else {"all_gather": 1}
    for tensor, pipeline, embeddings in LAYOUTS:
        report = proven(file, tensor, pipeline, out, group, embeddings=embeddings)
        blocks = exported.LAYERS * (3 if name == "t5_decoder" else 2)
        reduces = blocks + (embeddings == "split")
        assert report.collectives == ({} if tensor == 1 else {"all_reduce": reduces, **head})
        assert report.exact == ("fp16" not in name)
        assert report.rank_bytes < 2 * report.ideal_bytes or pipeline > 1 or tensor == 4


@pytest.mark.parametrize("name", QUICK)
def test_architectures(name: str, graphs: Graphs, tmp_path: Path, group: RankGroup) -> None:
    check_architecture(name, graphs, tmp_path / "out", group)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_architectures(name: str, graphs: Graphs, tmp_path: Path, group: RankGroup) -> None:
    check_architecture(name, graphs, tmp_path / "out", group)


def test_graphs_show_both_kinds_of_attention(graphs: Graphs) -> None:
    assert "Attention" in exported.operators(graphs("llama"))
    assert exported.operators(plain_graphs.transformer(Shape(), graphs("llama").with_name("plain.onnx"))) >= {"Softmax"}


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (2, 2)])
def test_minilm_with_its_real_weights(
    tensor: int, pipeline: int, tmp_path: Path, group: RankGroup, minilm_graph: Path
) -> None:
    """Its table of words is half of its weights, so it is split: one all-reduce more, and ranks near the ideal."""
    report = proven(minilm_graph, tensor, pipeline, tmp_path / "out", group, embeddings="auto")
    assert report.collectives == {"all_reduce": 2 * 6 + 1}
    assert report.per_token_bytes == 13 * 2 * (tensor - 1) * 384 * 4 // tensor
    # Stages are balanced by bytes and compute, and a lookup computes nothing: the first one holds more.
    assert report.rank_bytes < (1.1 if pipeline == 1 else 1.3) * report.ideal_bytes


@pytest.fixture(scope="module")
def minilm_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from builders.checkpoint import load_checkpoint
    from builders.export.encoder import export_encoder
    from builders.judging.corpus import texts
    from builders.spec import ModelSlice

    checkpoint = load_checkpoint(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding"))
    return export_encoder(checkpoint, "fp32", texts(None, 4), tmp_path_factory.mktemp("minilm")).file_path


def test_real_inputs_run_beside_random_ones(tmp_path: Path, group: RankGroup) -> None:
    file = plain_graphs.transformer(Shape(), tmp_path / "m.onnx")
    partition_graph(file, 2, 1, tmp_path / "out")
    sample = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}
    report = verify_partition(tmp_path / "out", file, samples=[sample], group=group)
    assert "sample 0" in {check.case for check in report.checks}
    with pytest.raises(InputError, match="samples of your own"):
        verify_partition(tmp_path / "out", file, samples=[{"input_ids": np.array([[99]])}], group=group)


@pytest.mark.parametrize(("bits", "tensor", "pipeline"), [(4, 2, 1), (8, 2, 1), (4, 4, 1), (4, 2, 2)])
def test_weight_only(bits: int, tensor: int, pipeline: int, tmp_path: Path, group: RankGroup) -> None:
    shape = Shape(
        heads=8, kv_heads=4, head_dim=16, hidden=64, ffn=128, attention="operator", gate="separate", norm="rms"
    )
    file = weight_only(plain_graphs.transformer(shape, tmp_path / "m.onnx"), tmp_path / "q.onnx", bits)
    report = proven(file, tensor, pipeline, tmp_path / "out", group)
    assert report.min_cosine >= 0.9999
    assert report.collectives == {"all_reduce": 4}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_int8_qdq(name: str, graphs: Graphs, tmp_path: Path, group: RankGroup) -> None:
    """Inputs are fixed: once in hundreds, a sum in another order rounds one activation to the next INT8 step."""
    file = qdq(graphs(name), tmp_path / "q.onnx")
    for tensor, pipeline in ((2, 1), (4, 1), (2, 2)):
        report = proven(file, tensor, pipeline, tmp_path / "out", group, seed=1)
        assert not report.exact
        assert report.min_cosine >= 0.9999


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (1, 8)])
def test_table_of_words_in_int8(axis: int, block: int, tmp_path: Path, group: RankGroup) -> None:
    shape = Shape(vocabulary=37, hidden=16, head=True)
    file = words(plain_graphs.transformer(shape, tmp_path / "m.onnx"), tmp_path / "q.onnx", axis, block)
    report = proven(file, 4, 1, tmp_path / "out", group, embeddings="split")
    assert report.collectives == {"all_gather": 1, "all_reduce": 5}
    whole = {each.source: each.cut is None for each in load_partition(tmp_path / "out").stages[0].weights}
    assert (whole["words"], whole["words_scale"]) == (False, axis == 1 and not block)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("bits", [0, 4])
def test_vocabulary_that_does_not_divide(bits: int, tensor: int, tmp_path: Path, group: RankGroup) -> None:
    shape = Shape(heads=4, kv_heads=4, head_dim=16, hidden=64, ffn=128, vocabulary=101, head=True)
    file = plain_graphs.transformer(shape, tmp_path / "m.onnx")
    file = weight_only(file, tmp_path / "q.onnx", bits) if bits else file
    choices: tuple[tuple[Embeddings, int], ...] = (("whole", 4), ("split", 5))
    for embeddings, reduces in choices:
        report = proven(file, tensor, 1, tmp_path / "out", group, embeddings=embeddings)
        assert report.collectives == {"all_gather": 1, "all_reduce": reduces}


SHAPES = st.builds(
    Shape,
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 4]),
    hidden=st.sampled_from([8, 10, 12]),
    ffn=st.sampled_from([8, 16, 24]),
    layers=st.sampled_from([1, 2]),
    attention=st.sampled_from(["products", "operator", "operator_flat"]),
    qkv=st.sampled_from(["separate", "split", "slices", "stacked"]),
    linear=st.sampled_from(["matmul", "gemm"]),
    gate=st.sampled_from(["none", "separate", "split"]),
    norm=st.sampled_from(["layer", "rms"]),
    first=st.booleans(),
    bias=st.booleans(),
    rotary=st.booleans(),
    sizes=st.sampled_from(["computed", "zeros"]),
    head=st.booleans(),
    vocabulary=st.sampled_from([32, 37]),
    mask=st.booleans(),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=SHAPES,
    layout=st.sampled_from([(2, 1), (4, 1), (2, 2), (1, 2)]),
    embeddings=st.sampled_from(["whole", "split"]),
)
def test_any_transformer(
    shape: Shape, layout: tuple[int, int], embeddings: Embeddings, tmp_path: Path, group: RankGroup
) -> None:
    file = plain_graphs.transformer(shape, tmp_path / "m.onnx")
    report = proven(file, *layout, tmp_path / "out", group, embeddings=embeddings)
    expected = {"all_reduce": 2 * shape.layers + (embeddings == "split")} | ({"all_gather": 1} if shape.head else {})
    assert report.collectives == ({} if layout[0] == 1 else expected)
