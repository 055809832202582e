"""What a partition holds, compared with the graph it came from: the plan, and every byte of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from builders.artifacts import Partition, PipelineStage, PlacedWeight
from builders.errors import CheckError
from builders.partition.cut.shard import PlannedStage, plan_graph
from builders.partition.cut.solve import Embeddings
from builders.partition.cut.weights import Buffer, slices
from builders.partition.placement import REPLICATE, Block, Placement, Shard
from builders.partition.prove.programs import collectives, read_rank
from builders.partition.read import Source

EMBEDDINGS: tuple[Embeddings, ...] = ("whole", "split")  # the two plans that there are
_INLINE_LIMIT = 4096  # unlisted constants over this are weights; the rewriting adds sizes only


def plan_faults(partition: Partition, against: Path) -> tuple[list[str], tuple[PlannedStage, ...]]:
    """Shards the graph again, on paper, and compares: with the table of words whole or split, as it was asked for.

    The plan that comes nearest is returned with what it has otherwise.
    """
    found = []
    for embeddings in EMBEDDINGS:
        planned = plan_graph(against, partition.tensor, partition.pipeline, embeddings)
        found.append((_plan_faults(partition, [stage.record for stage in planned]), planned))
        if not found[-1][0]:
            break
    return min(found, key=lambda each: len(each[0]))


def _plan_faults(partition: Partition, expected: Sequence[PipelineStage]) -> list[str]:
    faults = []
    for index, (stage, planned) in enumerate(zip(partition.stages, expected, strict=False)):
        if (stage.weights, stage.rank_bytes) != (planned.weights, planned.rank_bytes):
            faults.append(
                f"stage {index} places {stage.rank_bytes} bytes of weights, planned {planned.rank_bytes}, or other ones"
            )
        if stage.collectives != planned.collectives:
            faults.append(
                f"stage {index} has {len(stage.collectives)} collectives, planned {len(planned.collectives)}, or others"
            )
        if stage.files != planned.files:
            faults.append(f"stage {index} is in {', '.join(stage.files)}, planned {', '.join(planned.files)}")
        if (stage.inputs, stage.outputs) != (planned.inputs, planned.outputs):
            faults.append(f"stage {index} has other inputs or outputs than the plan")
    if len(partition.stages) != len(expected):
        faults.append(f"{len(partition.stages)} stages, the plan {len(expected)}")
    return faults


def weight_faults(partition: Partition, source: Source) -> list[str]:
    tensors = {name: value.const_value for value, name in source.origin.items()}
    faults = []
    for stage in partition.stages:
        for rank, name in enumerate(stage.files):
            try:
                model = read_rank(partition.path(name))
                faults += _rank_faults(partition, stage, rank, model, tensors)
            except (CheckError, OSError, EOFError, ValueError) as error:
                faults.append(str(error))
    return faults


def _rank_faults(
    partition: Partition,
    stage: PipelineStage,
    rank: int,
    model: onnx.ModelProto,
    tensors: dict[str, ir.TensorProtocol | None],
) -> list[str]:
    name = stage.files[rank]
    found = [(each.operation, each.target, each.ranks) for each in collectives(model)]
    listed = sorted((each.operation, partition.tensor) for each in stage.collectives)
    faults = []
    if sorted((operation, ranks) for operation, _, ranks in found) != listed:
        faults.append(f"{name} holds {len(found)} collectives, the plan {len(listed)}, or others")
    held = {
        tensor.name: ir.serde.deserialize_tensor(tensor, base_path=partition.directory)
        for tensor in model.graph.initializer
    }
    for weight in stage.weights:
        tensor, whole = held.pop(weight.name, None), tensors.get(weight.source)
        if tensor is None or whole is None:
            faults.append(f"{name} has no weight {weight.name} ({weight.source} of the source)")
        elif tensor.nbytes != weight.bytes or tuple(tensor.shape.numpy()) != weight.dims:
            faults.append(f"{name}: weight {weight.name} holds {tensor.nbytes} bytes, the plan {weight.bytes}")
        elif not _same(tensor, whole, placement_of(weight), rank, partition.tensor):
            faults.append(f"{name}: weight {weight.name} is not rank {rank}'s part of {weight.source}")
    faults += [
        f"{name} holds an unlisted weight {key}" for key, tensor in held.items() if tensor.nbytes > _INLINE_LIMIT
    ]
    return faults


def placement_of(weight: PlacedWeight) -> Placement:
    if weight.cut is None:
        return REPLICATE
    return Shard(weight.cut.dim, tuple(Block(size, parts) for size, parts in weight.cut.blocks))


def _same(tensor: ir.TensorProtocol, whole: ir.TensorProtocol, placement: Placement, rank: int, ranks: int) -> bool:
    """Byte for byte, a buffer at a time."""
    have = _Bytes(slices(tensor, REPLICATE, 0, 1))
    for data in slices(whole, placement, rank, ranks):
        if not np.array_equal(have.take(len(data)), data):
            return False
    return have.empty()


class _Bytes:
    """Pieces of any sizes, taken in other sizes."""

    def __init__(self, pieces: Iterator[Buffer]) -> None:
        self._pieces, self._rest = pieces, np.empty(0, np.uint8)

    def take(self, count: int) -> Buffer:
        taken = [self._rest[:count].copy()]
        self._rest = self._rest[count:]
        missing = count - len(taken[0])
        while missing > 0:
            piece = next(self._pieces, None)
            if piece is None:
                break
            taken.append(piece[:missing].copy())
            self._rest = piece[missing:].copy()
            missing -= len(taken[-1])
        return np.concatenate(taken)

    def empty(self) -> bool:
        return len(self._rest) == 0 and next(self._pieces, None) is None
