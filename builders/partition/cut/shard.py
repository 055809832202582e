"""`partition_graph`: one graph in, `stage{s}.rank{r}.onnx` with their weights and `partition.json` out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from builders.artifacts import (
    CollectiveRecord,
    Cut,
    FileRecord,
    Partition,
    PipelineStage,
    PlacedWeight,
    StagePort,
    TensorSpec,
    file_digest,
)
from builders.errors import InputError
from builders.partition.cut.localise import LocalGraph
from builders.partition.cut.passes import run_passes
from builders.partition.cut.solve import Embeddings, solve
from builders.partition.cut.stages import Stage
from builders.partition.cut.weights import Placed, RankFile, lay_out, slice_bytes, slices, write_files
from builders.partition.placement import Placement, Shard, local_shape
from builders.partition.read import Source, read, shape_of
from builders.store.atomic import atomic_directory

MANIFEST = "partition.json"
_INLINE_BYTES = 1024  # smaller weights stay in the graph file, where shape inference can read them


def partition_graph(
    graph_file: Path, tensor: int, pipeline: int, out: Path, embeddings: Embeddings = "auto"
) -> Partition:
    """Shares a graph out to `tensor` ranks in each of `pipeline` stages, into the new directory `out`.

    `embeddings` says whether the table of words is split too; see `solve`.
    Nothing of it is trusted before `verify_partition` has run it. Raises InputError: a graph that cannot be read,
    ranks that do not divide heads or widths, more stages than blocks, `out` that holds files; UnsupportedError:
    vendor operators, control flow, nothing to split. Nothing half-written is left behind.
    """
    for name, count in (("tensor", tensor), ("pipeline", pipeline)):
        if count < 1:
            raise InputError(
                f"{name}={count}", got=str(count), expected="1 or more", fix=f"use {name}=1 to keep it whole"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"output {out}", got="files in it", expected="a new or empty directory", fix="choose another")
    source = read(graph_file)
    inputs, outputs = ports(source)
    source_bytes = source.weight_bytes
    solution = solve(source, tensor, embeddings)
    local, stages = run_passes(source, solution, pipeline, graph_file.name)
    planned = [_plan(stage, local) for stage in stages]
    with atomic_directory(out) as work:
        written = _write_stages(planned, work)
        partition = Partition(
            directory=work,
            files=tuple(written),
            tensor=tensor,
            pipeline=pipeline,
            opset=source.graph.opset_imports[""],
            source_file=graph_file.name,
            source_digest=file_digest(graph_file),
            source_bytes=source_bytes,
            stages=tuple(stage.record for stage in planned),
            inputs=inputs,
            outputs=outputs,
            states=tuple(_states(local.model.graph)),
            kept_whole=solution.kept_whole,
        )
        write_manifest(partition)
    return partition.model_copy(update={"directory": out})


def plan_graph(
    graph_file: Path, tensor: int, pipeline: int, embeddings: Embeddings = "auto"
) -> tuple[PlannedStage, ...]:
    """What `partition_graph` would write, without writing it."""
    source = read(graph_file)
    local, stages = run_passes(source, solve(source, tensor, embeddings), pipeline, graph_file.name)
    return tuple(_plan(stage, local) for stage in stages)


@dataclass(frozen=True)
class PlannedStage:
    """A stage on paper. `content`: weights for the ranks' files; `small`: those of each rank that stay in its graph."""

    index: int
    record: PipelineStage
    content: Sequence[Placed]
    small: dict[str, list[bytes]]
    model: onnx.ModelProto

    def graph(self, rank: int) -> onnx.ModelProto:
        """The graph of one rank; it is valid until another one is asked for."""
        _address(self.model, rank, self.record.files[rank], self.small)
        onnx.helper.set_model_props(self.model, {"trireme.stage": str(self.index), "trireme.rank": str(rank)})
        return self.model


def ports(source: Source) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the whole graph."""
    return tuple(map(_spec, source.graph.inputs)), tuple(map(_spec, source.graph.outputs))


def write_manifest(partition: Partition) -> None:
    (partition.directory / MANIFEST).write_text(partition.model_dump_json(indent=1) + "\n")


def load_partition(directory: Path) -> Partition:
    """Raises InputError where there is no readable `partition.json`."""
    try:
        data = json.loads((directory / MANIFEST).read_text())
        return Partition.model_validate({**data, "directory": directory})
    except (OSError, ValueError) as error:
        raise InputError(
            f"partition {directory}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected=f"a {MANIFEST} that `trireme shard` wrote",
            fix="give the directory that holds it, or shard the graph again",
        ) from error


def _plan(stage: Stage, local: LocalGraph) -> PlannedStage:
    content, small = _place(stage, local)
    names = [f"stage{stage.index}.rank{rank}.onnx" for rank in range(local.ranks)]
    record = _describe_stage(stage, local, names, _held(stage, local))
    return PlannedStage(stage.index, record, content, small, ir.to_proto(stage.model))


def _write_stages(planned: Sequence[PlannedStage], work: Path) -> list[FileRecord]:
    """Weights of all ranks side by side, then the graphs, which say where in the files the weights lie."""
    files = [
        RankFile(work / f"{name}.data", rank, len(stage.record.files), stage.content)
        for stage in planned
        for rank, name in enumerate(stage.record.files)
        if stage.content
    ]
    data = {record.name: record for record in write_files(files)}
    written = []
    for stage in planned:
        names = stage.record.files
        written += [data[f"{name}.data"] for name in names if f"{name}.data" in data]
        for rank, name in enumerate(names):
            (work / name).write_bytes(stage.graph(rank).SerializeToString(deterministic=True))
        written += [FileRecord.of(work / name) for name in names]
    return written


def _place(stage: Stage, local: LocalGraph) -> tuple[list[Placed], dict[str, list[bytes]]]:
    """Where the weights lie in the files of the ranks, and the small ones themselves; the stage's graph says so too."""
    small: dict[str, list[bytes]] = {}
    large: list[tuple[ir.Value, ir.TensorProtocol, Placement]] = []
    for name, value in _held(stage, local).items():
        tensor, (_, placement) = value.const_value, local.weights[name]
        assert tensor is not None
        if slice_bytes(tensor, placement) > _INLINE_BYTES:
            large.append((value, tensor, placement))
            continue
        ranks = range(local.ranks)
        small[name] = [b"".join(map(bytes, slices(tensor, placement, rank, local.ranks))) for rank in ranks]
        value.const_value = _external(value, tensor, placement, 0)
    for name in {str(value.name) for value in stage.model.graph.initializers.values()} & set(local.by_rank):
        small[name] = [local.by_rank[name][rank].tobytes() for rank in range(local.ranks)]
    content = lay_out([(tensor, placement) for _, tensor, placement in large])
    for (value, tensor, placement), placed in zip(large, content, strict=True):
        value.const_value = _external(value, tensor, placement, placed.offset)
    return content, small


def _held(stage: Stage, local: LocalGraph) -> dict[str, ir.Value]:
    """Weights of the stage by name; constants that the rewriting made are left out."""
    return {str(value.name): value for value in stage.model.graph.initializers.values() if value.name in local.weights}


def _external(value: ir.Value, tensor: ir.TensorProtocol, placement: Placement, offset: int) -> ir.ExternalTensor:
    shape = ir.Shape(local_shape([int(size) for size in tensor.shape.numpy()], placement))
    return ir.ExternalTensor(
        "", offset, slice_bytes(tensor, placement), tensor.dtype, shape=shape, name=str(value.name)
    )


def _address(proto: onnx.ModelProto, rank: int, name: str, small: dict[str, list[bytes]]) -> None:
    """Turns the stage's graph into that of one rank: its own data file, its own small weights."""
    for tensor in proto.graph.initializer:
        if tensor.name in small:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = small[tensor.name][rank]
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{name}.data"


def _describe_stage(stage: Stage, local: LocalGraph, names: list[str], held: dict[str, ir.Value]) -> PipelineStage:
    graph = stage.model.graph
    weights = tuple(_weight(local, name, value) for name, value in held.items())
    made = {str(value.name) for node in graph for value in node.outputs}
    return PipelineStage(
        files=tuple(names),
        inputs=tuple(_port(value, local.inputs, stage.inputs.get(str(value.name))) for value in graph.inputs),
        outputs=tuple(_port(value, local.outputs, None) for value in graph.outputs),
        weights=weights,
        collectives=tuple(
            CollectiveRecord(operation=each.operation, value=each.value, bytes_per_token=each.bytes_per_token)
            for each in local.collectives
            if each.value in made
        ),
        rank_bytes=sum(weight.bytes for weight in weights),
    )


def _weight(local: LocalGraph, name: str, value: ir.Value) -> PlacedWeight:
    origin, placement = local.weights[name]
    tensor = value.const_value
    assert tensor is not None
    return PlacedWeight(
        name=name,
        source=origin,
        dtype=tensor.dtype.name.lower(),
        dims=tuple(int(size) for size in tensor.shape.numpy()),
        cut=_cut(placement),
        bytes=tensor.nbytes,
    )


def _cut(placement: Placement | None) -> Cut | None:
    if not isinstance(placement, Shard):
        return None
    return Cut(dim=placement.dim, blocks=tuple((block.size, block.parts) for block in placement.blocks))


def _port(value: ir.Value, cuts: dict[str, Shard], sender: int | None) -> StagePort:
    return StagePort(**_spec(value).model_dump(), cut=_cut(cuts.get(str(value.name))), from_stage=sender)


def _spec(value: ir.Value) -> TensorSpec:
    dims = tuple(size if isinstance(size, int) or not size.startswith("?") else "" for size in shape_of(value) or ())
    dtype = value.dtype.name.lower() if value.dtype is not None else "undefined"
    return TensorSpec(name=str(value.name), dtype=_NUMPY_NAMES.get(dtype, dtype), dims=dims)


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def _states(graph: ir.Graph) -> Sequence[tuple[str, str]]:
    """Graph outputs that are a graph input written further: caches. (output, input)."""
    found = []
    for node in graph:
        pairs = {"TensorScatter": ((0, 0),), "Concat": ((0, 0),), "Attention": ((1, 4), (2, 5))}.get(node.op_type, ())
        for made, past in pairs:
            value = node.outputs[made] if made < len(node.outputs) else None
            given = node.inputs[past] if past < len(node.inputs) else None
            if value is None or given is None or not value.is_graph_output() or not given.is_graph_input():
                continue
            if len(given.shape or ()) >= 3 and given.dtype == value.dtype:
                found.append((str(value.name), str(given.name)))
    return found
