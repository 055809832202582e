"""Faults that are put into sound partitions: numbers catch each of them.

Every mutation is signed again, so that digests say nothing.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from builders.artifacts import FileRecord, Partition
from builders.errors import CheckError, ParityError
from builders.partition.cut.shard import load_partition, partition_graph, write_manifest
from builders.partition.prove.edges import boundary_ids
from builders.partition.prove.plan_and_weights import plan_faults
from builders.partition.prove.structure import differences, structure_faults
from builders.partition.prove.verify import verify_partition
from runtime.ranks.group import RankGroup
from tests.partition import plain_graphs, running
from tests.partition.plain_graphs import Shape
from tests.partition.running import Graphs

graphs, groups, group = running.graphs, running.groups, running.group


@pytest.fixture(scope="module")
def gpt2(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A graph with biases behind its row splits, and a sound partition of it: 2 ranks x 2 stages."""
    out = tmp_path_factory.mktemp("sound") / "gpt2"
    partition_graph(graphs("gpt2"), 2, 2, out, "whole")
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


@pytest.fixture(scope="module")
def split_words(graphs: Graphs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sound partition whose ranks share the table of words: the first collective sums the lookups."""
    out = tmp_path_factory.mktemp("sound") / "llama"
    partition_graph(graphs("llama"), 2, 1, out, "split")
    return graphs("llama"), out


def test_lookups_that_are_not_summed(split_words: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    def drop(model: onnx.ModelProto, _: str) -> None:
        node = first_reduction(model)
        assert node.input[0].startswith(node.output[0])
        node.op_type = "Identity"
        del node.attribute[:]

    caught(mutated(split_words[1], tmp_path / "m", drop), split_words[0], group)


def test_rank_that_looks_words_up_in_the_rows_of_another(
    split_words: tuple[Path, Path], tmp_path: Path, group: RankGroup
) -> None:
    """The only constant that differs between ranks. It is no weight of the source, so numbers alone can tell."""

    def first(model: onnx.ModelProto, _: str) -> None:
        rows = [tensor for tensor in model.graph.initializer if tensor.name.endswith("/first_row")]
        assert len(rows) == 1
        rows[0].raw_data = np.int64(0).tobytes()

    caught(mutated(split_words[1], tmp_path / "m", first), split_words[0], group)


def test_rank_that_answers_for_words_it_does_not_hold(
    split_words: tuple[Path, Path], tmp_path: Path, group: RankGroup
) -> None:
    """Without the mask, every rank adds a row: twice the lookup, or a row of another word."""

    def unmask(model: onnx.ModelProto, _: str) -> None:
        partial = first_reduction(model).input[0]
        node = next(each for each in model.graph.node if partial in each.output)
        assert node.op_type == "Where"
        rows = node.input[1]
        node.op_type = "Identity"
        node.input[:] = [rows]

    caught(mutated(split_words[1], tmp_path / "m", unmask), split_words[0], group)


def test_shard_of_words_that_is_one_row_short(split_words: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    """One word in sixty-four is answered with zeros: random words seldom meet it, those at the boundaries always."""

    def shorten(model: onnx.ModelProto, _: str) -> None:
        rows = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("/row_count"))
        rows.raw_data = (numpy_helper.to_array(rows) - 1).tobytes()

    said = caught(mutated(split_words[1], tmp_path / "m", shorten), split_words[0], group)
    assert "boundary words" in said.partition("; the worst")[0]  # random words may meet it too, and differ more
    assert "/row_count is INT64 [] 0x000000000000001f, the plan INT64 [] 0x0000000000000020" in said


@pytest.fixture(scope="module", params=["layer", "rms", "rms_operator"])
def normed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A graph with every kind of norm in turn, written by hand, and a sound partition of it."""
    folder = tmp_path_factory.mktemp(request.param)
    file = plain_graphs.transformer(Shape(norm=request.param, head=True, hidden=16), folder / "g.onnx")
    partition_graph(file, 2, 1, folder / "ranks", "split")
    return file, folder / "ranks"


def test_epsilon_of_every_kind_of_norm(normed: tuple[Path, Path], tmp_path: Path, group: RankGroup) -> None:
    """Three times the epsilon is lost among activations of ordinary size."""

    def widen(model: onnx.ModelProto, _: str) -> None:
        for node in model.graph.node:
            for item in node.attribute:
                if item.name == "epsilon":
                    item.f *= 3
            if node.op_type == "LayerNormalization" and not node.attribute:
                node.attribute.append(onnx.helper.make_attribute("epsilon", 3e-5))
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32 and array.size == 1 and array.item() == np.float32(1e-5):
                tensor.raw_data = (array * 3).tobytes()

    with pytest.raises(CheckError, match=r"epsilon is .*, the plan|is not rank 0's part of w\d+"):
        verify_partition(mutated(normed[1], tmp_path / "m", widen), normed[0], group=group)


def test_weights_of_one_shape_that_are_swapped(tmp_path: Path, group: RankGroup) -> None:
    """Keys and values: first which node reads them, then what they hold."""
    file = plain_graphs.transformer(Shape(hidden=16, bias=False), tmp_path / "g.onnx")
    partition = partition_graph(file, 2, 1, tmp_path / "ranks", "whole")
    shapes: dict[tuple[int, ...], list[str]] = {}
    for weight in partition.stages[0].weights:
        if weight.cut is not None:
            shapes.setdefault(weight.dims, []).append(weight.name)
    first, second = next(names for names in shapes.values() if len(names) > 1)[:2]

    def swap_readers(model: onnx.ModelProto, _: str) -> None:
        for node in model.graph.node:
            node.input[:] = [{first: second, second: first}.get(name, name) for name in node.input]

    def swap_content(model: onnx.ModelProto, _: str) -> None:
        names = {tensor.name: tensor for tensor in model.graph.initializer}
        names[first].name, names[second].name = second, first

    assert "has input [" in caught(mutated(tmp_path / "ranks", tmp_path / "m", swap_readers), file, group)
    said = caught(mutated(tmp_path / "ranks", tmp_path / "n", swap_content), file, group)
    assert "is not rank 0's part" in said


@pytest.mark.parametrize(("name", "value"), [("groups", [0]), ("reduce_op", "max"), ("root", 0)])
def test_collective_over_another_group(
    name: str, value: object, gpt2: tuple[Path, Path], tmp_path: Path, group: RankGroup
) -> None:
    def change(model: onnx.ModelProto, _: str) -> None:
        node = first_reduction(model)
        kept = [item for item in node.attribute if item.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    with pytest.raises(CheckError, match=name):
        verify_partition(mutated(gpt2[1], tmp_path / "m", change), gpt2[0], group=group)


@pytest.mark.parametrize("norm", ["layer", "rms_operator"])
def test_no_attribute_input_or_constant_can_change_unseen(norm: Any, tmp_path: Path) -> None:
    """Every one in turn, against the plan alone: no numbers are computed here."""
    shape = Shape(norm=norm, head=True, hidden=16, linear="gemm", gate="split", attention="operator_flat", qkv="slices")
    file = plain_graphs.transformer(shape, tmp_path / "g.onnx")
    partition = partition_graph(file, 2, 1, tmp_path / "ranks", "split")
    faults, planned = plan_faults(partition, file)
    assert not faults
    assert not structure_faults(partition, planned)
    sound = onnx.load(str(tmp_path / "ranks" / "stage0.rank1.onnx"), load_external_data=False)
    listed = {weight.name for weight in partition.stages[0].weights}
    plan = planned[0].graph(1)
    changed = list(_each_change(sound, listed))
    assert len(changed) > 200
    unseen = [what for what, model in changed if not list(differences(model, plan, listed, tmp_path / "ranks"))]
    assert not unseen


def _each_change(sound: onnx.ModelProto, listed: set[str]) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The graph with one thing changed, for each thing."""
    for at, node in enumerate(sound.graph.node):
        for kind in ("op_type", "input", "output", *(f"attribute {index}" for index in range(len(node.attribute)))):
            model = copy.deepcopy(sound)
            other = model.graph.node[at]
            if kind == "op_type":
                other.op_type = "Identity" if node.op_type != "Identity" else "Abs"
            elif kind in ("input", "output"):
                getattr(other, kind)[0] += "/other"
            else:
                item = other.attribute[int(kind.split()[1])]
                value = onnx.helper.get_attribute_value(item)
                numbers = [*value, 1] if isinstance(value, Sequence) and not isinstance(value, bytes) else None
                changed = numbers or (value + (b"x" if isinstance(value, bytes) else 1))
                item.CopyFrom(onnx.helper.make_attribute(item.name, changed, attr_type=item.type))
            yield f"{kind} of {node.op_type} {node.name}", model
        model = copy.deepcopy(sound)
        del model.graph.node[at]
        yield f"no {node.op_type} {node.name}", model
    for at, tensor in enumerate(sound.graph.initializer):
        model = copy.deepcopy(sound)
        model.graph.initializer[at].data_type = onnx.TensorProto.DOUBLE
        yield f"type of {tensor.name}", model
        if tensor.name not in listed:
            model = copy.deepcopy(sound)
            array = numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[0] = ~array.reshape(-1)[0] if array.dtype.kind in "bi" else array.reshape(-1)[0] + 1
            model.graph.initializer[at].CopyFrom(numpy_helper.from_array(array, tensor.name))
            yield f"constant {tensor.name}", model


def test_the_boundaries_of_every_shard_are_fed() -> None:
    assert boundary_ids(64, 2) == [0, 31, 32, 63]
    assert boundary_ids(10, 4) == [0, 2, 3, 5, 6, 8, 9]  # 3 rows a rank, one for the last
    assert boundary_ids(2, 8) == [0, 1]


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
    file = plain_graphs.transformer(Shape(hidden=32, ffn=64), tmp_path / "e.onnx")
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
    file = plain_graphs.transformer(Shape(), tmp_path / "m.onnx")
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
    again: Partition = partition_graph(gpt2[0], 2, 2, tmp_path / "again", "whole")
    assert again.digest == load_partition(gpt2[1]).digest
