"""Partitions run as real processes: what is right passes, and every mutation is caught by numbers.

Graphs come from torch once and are kept in pytest's cache, by the source that makes them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from builders.artifacts import FileRecord, Partition
from builders.errors import CheckError, InputError, ParityError
from builders.partition.shard import load_partition, partition_graph, write_manifest
from builders.partition.verify import VerifyReport, verify_partition
from runtime.ranks.group import RankGroup
from tests import partition_graphs, partition_legacy, partition_plain
from tests.partition_plain import Shape
from tests.partition_quantised import qdq, weight_only

RANKS = 4
QUICK = ("gpt2", "llama", "t5_decoder", "legacy_gpt2_cached")
GRAPHS = partition_graphs.GRAPHS | partition_legacy.GRAPHS
SLOW = tuple(name for name in GRAPHS if name not in QUICK)
LAYOUTS = ((2, 1), (4, 1), (2, 2), (1, 3))

Graphs = Callable[[str], Path]


@pytest.fixture(scope="module")
def groups() -> Iterator[list[RankGroup]]:
    running = [RankGroup(RANKS)]
    yield running
    running[0].close()


@pytest.fixture
def group(groups: list[RankGroup]) -> RankGroup:
    """Processes that tests share; new ones after a mutation that ended them."""
    if not groups[0].processes:
        groups[0] = RankGroup(RANKS)
    return groups[0]


@pytest.fixture(scope="session")
def graphs(request: pytest.FixtureRequest) -> Graphs:
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (partition_graphs, partition_legacy))
    versions = "".join(metadata.version(name) for name in ("torch", "transformers", "onnxscript"))
    folder = request.config.cache.mkdir(f"partition-{hashlib.sha256(source + versions.encode()).hexdigest()[:12]}")

    def graph(name: str) -> Path:
        file = folder / f"{name}.onnx"
        return file if file.is_file() else GRAPHS[name](file)

    return graph


def proven(file: Path, tensor: int, pipeline: int, out: Path, group: RankGroup) -> VerifyReport:
    shutil.rmtree(out, ignore_errors=True)
    partition_graph(file, tensor, pipeline, out)
    return verify_partition(out, file, group=group)


def check_architecture(name: str, graphs: Graphs, out: Path, group: RankGroup) -> None:
    """Every layout of one architecture; two all-reduces a block (three with cross attention) and one gather."""
    file = graphs(name)
    headless = ("bert", "roberta", "distilbert", "t5_encoder", "llama_wide", "legacy_bert")
    head = {} if name in headless else {"all_gather": 1}
    for tensor, pipeline in LAYOUTS:
        report = proven(file, tensor, pipeline, out, group)
        blocks = partition_graphs.LAYERS * (3 if name == "t5_decoder" else 2)
        assert report.collectives == ({} if tensor == 1 else {"all_reduce": blocks, **head})
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
    assert "Attention" in partition_graphs.operators(graphs("llama"))
    assert partition_graphs.operators(
        partition_plain.transformer(Shape(), graphs("llama").with_name("plain.onnx"))
    ) >= {"Softmax"}


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (2, 2)])
def test_minilm_with_its_real_weights(
    tensor: int, pipeline: int, tmp_path: Path, group: RankGroup, minilm_graph: Path
) -> None:
    report = proven(minilm_graph, tensor, pipeline, tmp_path / "out", group)
    assert report.collectives == {"all_reduce": 12}
    assert report.per_token_bytes == 12 * 2 * (tensor - 1) * 384 * 4 // tensor


@pytest.fixture(scope="module")
def minilm_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from builders.checkpoint import load_checkpoint
    from builders.corpus import texts
    from builders.export.encoder import export_encoder
    from builders.spec import ModelSlice

    checkpoint = load_checkpoint(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding"))
    return export_encoder(checkpoint, "fp32", texts(None, 4), tmp_path_factory.mktemp("minilm")).file_path


def test_real_inputs_run_beside_random_ones(tmp_path: Path, group: RankGroup) -> None:
    file = partition_plain.transformer(Shape(), tmp_path / "m.onnx")
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
    file = weight_only(partition_plain.transformer(shape, tmp_path / "m.onnx"), tmp_path / "q.onnx", bits)
    report = proven(file, tensor, pipeline, tmp_path / "out", group)
    assert report.min_cosine >= 0.9999
    assert report.collectives == {"all_reduce": 4}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_int8_qdq(name: str, graphs: Graphs, tmp_path: Path, group: RankGroup) -> None:
    file = qdq(graphs(name), tmp_path / "q.onnx")
    for tensor, pipeline in ((2, 1), (4, 1), (2, 2)):
        report = proven(file, tensor, pipeline, tmp_path / "out", group)
        assert not report.exact
        assert report.min_cosine >= 0.9999


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("bits", [0, 4])
def test_vocabulary_that_does_not_divide(bits: int, tensor: int, tmp_path: Path, group: RankGroup) -> None:
    shape = Shape(heads=4, kv_heads=4, head_dim=16, hidden=64, ffn=128, vocabulary=101, head=True)
    file = partition_plain.transformer(shape, tmp_path / "m.onnx")
    file = weight_only(file, tmp_path / "q.onnx", bits) if bits else file
    report = proven(file, tensor, 1, tmp_path / "out", group)
    assert report.collectives == {"all_gather": 1, "all_reduce": 4}


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
@given(shape=SHAPES, layout=st.sampled_from([(2, 1), (4, 1), (2, 2), (1, 2)]))
def test_any_transformer(shape: Shape, layout: tuple[int, int], tmp_path: Path, group: RankGroup) -> None:
    file = partition_plain.transformer(shape, tmp_path / "m.onnx")
    report = proven(file, *layout, tmp_path / "out", group)
    expected = {"all_reduce": 2 * shape.layers} | ({"all_gather": 1} if shape.head else {})
    assert report.collectives == ({} if layout[0] == 1 else expected)


# Mutations. Each is signed again, so that digests say nothing.


@pytest.fixture(scope="module")
def gpt2(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A graph with biases behind its row splits, and a sound partition of it: 2 ranks x 2 stages."""
    out = tmp_path_factory.mktemp("sound") / "gpt2"
    partition_graph(graphs("gpt2"), 2, 2, out)
    return graphs("gpt2"), out


def mutated(
    sound: Path, target: Path, change: Callable[[onnx.ModelProto, str], None], names: tuple[str, ...] | None = None
) -> Path:
    """A copy with `change` made to the graphs of the named ranks (all by default), and new digests."""
    shutil.copytree(sound, target)
    for stage in load_partition(target).stages:
        for name in stage.files:
            if names is None or name in names:
                model = onnx.load(str(target / name))
                change(model, name)
                onnx.save(model, str(target / name), save_as_external_data=False)
    return signed(target)


def signed(directory: Path) -> Path:
    partition = load_partition(directory)
    present = [record.name for record in partition.files if (directory / record.name).is_file()]
    write_manifest(partition.model_copy(update={"files": tuple(FileRecord.of(directory / name) for name in present)}))
    return directory


def caught(directory: Path, whole: Path, group: RankGroup) -> str:
    with pytest.raises(ParityError) as error:
        verify_partition(directory, whole, group=group)
    assert "outputs differ" in str(error.value)
    assert error.value.exit_code == 1
    return str(error.value)


def first_reduction(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "DistCollective")


def test_dropped_collective(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    def drop(model: onnx.ModelProto, _: str) -> None:
        node = first_reduction(model)
        node.op_type = "Identity"
        del node.attribute[:]

    assert "collectives" in caught(mutated(gpt2[1], tmp_path / "m", drop), gpt2[0], group)


def test_row_bias_on_every_rank(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    """The most frequent fault of hand-written tensor parallelism: partial + bias, then the sum."""

    def early(model: onnx.ModelProto, _: str) -> None:
        node = first_reduction(model)
        add = next(each for each in model.graph.node if each.op_type == "Add" and node.output[0] in each.input)
        partial, whole, result = node.input[0], node.output[0], add.output[0]
        node.input[0], node.output[0] = whole, result
        add.input[list(add.input).index(whole)] = partial
        add.output[0] = whole
        nodes = [each for each in model.graph.node if each is not node and each is not add]
        at = next(index for index, each in enumerate(nodes) if partial in each.output) + 1
        reordered = [
            onnx.NodeProto.FromString(each.SerializeToString()) for each in [*nodes[:at], add, node, *nodes[at:]]
        ]
        del model.graph.node[:]
        model.graph.node.extend(reordered)

    caught(mutated(gpt2[1], tmp_path / "m", early), gpt2[0], group)


def test_slice_along_the_wrong_axis(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    """Columns of a square row-split weight, in the shape of its rows."""
    whole = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(gpt2[0])).graph.initializer}
    weight = next(
        each
        for each in load_partition(gpt2[1]).stages[0].weights
        if each.cut and each.cut.dim == 0 and len(each.dims) == 2 and len(set(whole[each.source].shape)) == 1
    )

    def turn(model: onnx.ModelProto, name: str) -> None:
        rank = int("rank1" in name)
        for tensor in model.graph.initializer:
            if tensor.name == weight.name:
                columns = np.split(whole[weight.source], 2, axis=1)[rank].reshape(weight.dims)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(columns), tensor.name))

    names = load_partition(gpt2[1]).stages[0].files
    assert weight.name in caught(mutated(gpt2[1], tmp_path / "m", turn, names), gpt2[0], group)


def test_cut_in_the_wrong_place(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    """The first stage sends what stood on the residual stream before its last addition."""
    sent = next(port.name for port in load_partition(gpt2[1]).stages[1].inputs if port.from_stage == 0)

    def early(model: onnx.ModelProto, _: str) -> None:
        add = next(node for node in model.graph.node if sent in node.output)
        del add.input[1:]
        add.op_type = "Identity"

    caught(mutated(gpt2[1], tmp_path / "m", early, load_partition(gpt2[1]).stages[0].files), gpt2[0], group)


def test_nan_in_one_weight(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    def spoil(model: onnx.ModelProto, _: str) -> None:
        tensor = next(each for each in model.graph.initializer if len(each.dims) == 2)
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    names = load_partition(gpt2[1]).stages[1].files[1:]
    assert "inf" in caught(mutated(gpt2[1], tmp_path / "m", spoil, names), gpt2[0], group)


@pytest.mark.parametrize("stage", [0, 1])
def test_swapped_ranks(stage: int, gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    shutil.copytree(gpt2[1], tmp_path / "m")
    first, second = (f"stage{stage}.rank{rank}.onnx" for rank in range(2))
    swap_files(tmp_path / "m", first, second)
    assert "is not rank 0's part" in caught(signed(tmp_path / "m"), gpt2[0], group)


def test_swapped_ranks_of_an_encoder(tmp_path: Path, group: RankGroup) -> None:
    """Sums do not depend on the order of their ranks: only the weights' own numbers tell."""
    file = partition_plain.transformer(Shape(hidden=32, ffn=64), tmp_path / "e.onnx")
    partition_graph(file, 2, 1, tmp_path / "m")
    swap_files(tmp_path / "m", "stage0.rank0.onnx", "stage0.rank1.onnx")
    with pytest.raises(CheckError, match="is not rank 0's part"):
        verify_partition(signed(tmp_path / "m"), file, group=group)


def swap_files(directory: Path, first: str, second: str) -> None:
    """Graphs and weights change places, and each graph still finds its own weights."""
    models = [onnx.load(str(directory / name)) for name in (first, second)]
    for model, name in zip(models, (second, first), strict=True):
        (directory / name).unlink()
        (directory / f"{name}.data").unlink()
        onnx.save(
            model, str(directory / name), save_as_external_data=True, location=f"{name}.data", size_threshold=1024
        )


def test_full_size_weights_on_a_rank(tmp_path: Path, group: RankGroup) -> None:
    """Every rank runs the whole graph: the numbers are right, and nothing is shared out."""
    file = partition_plain.transformer(Shape(), tmp_path / "m.onnx")
    partition = partition_graph(file, 2, 1, tmp_path / "out")
    for name in partition.stages[0].files:
        shutil.copyfile(file, tmp_path / "out" / name)
    with pytest.raises(CheckError, match="bytes"):
        verify_partition(signed(tmp_path / "out"), file, group=group)


def test_file_that_changed_or_went(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    shutil.copytree(gpt2[1], tmp_path / "m")
    data = tmp_path / "m" / "stage1.rank0.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(CheckError, match="not the file that was written"):
        verify_partition(tmp_path / "m", gpt2[0], group=group)
    data.unlink()
    with pytest.raises(CheckError, match="is missing"):
        verify_partition(tmp_path / "m", gpt2[0])


def test_manifest_that_claims_another_plan(gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    shutil.copytree(gpt2[1], tmp_path / "m")
    partition = load_partition(tmp_path / "m")
    stage = partition.stages[0].model_copy(update={"collectives": ()})
    write_manifest(partition.model_copy(update={"stages": (stage, *partition.stages[1:])}))
    with pytest.raises(CheckError, match="stage 0 has 0 collectives"):
        verify_partition(tmp_path / "m", gpt2[0], group=group)


def test_partition_of_another_graph(gpt2: tuple[Path, Path], graphs: Graphs, group: RankGroup) -> None:
    with pytest.raises(CheckError):
        verify_partition(gpt2[1], graphs("llama"), group=group)


def test_sharding_twice_gives_the_same_files(gpt2: tuple[Path, Path], tmp_path: Path) -> None:
    again: Partition = partition_graph(gpt2[0], 2, 2, tmp_path / "again")
    assert again.digest == load_partition(gpt2[1]).digest
