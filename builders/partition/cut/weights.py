"""Slices of weights, streamed from the source file to the files of the ranks.

No tensor is ever in memory whole. Each rank's file is one task, which reads, hashes and writes a piece while it is in
the processor's cache, and shares nothing with the other tasks; reading and hashing run outside Python's lock. A column
split reads the rows again for each rank, from the page cache.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import chain
from pathlib import Path
from threading import Event

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.artifacts import FileRecord
from builders.partition.placement import Placement, Shard, local_shape, spans

BUFFER_BYTES = 256 << 10  # fits the second-level cache; ext4 took writes of 4 MiB ten times slower a byte than these
_PAGE = 4096  # external data is mapped page by page
Buffer = NDArray[np.uint8]


@dataclass(frozen=True)
class Placed:
    """A tensor of the source, and where a rank's slice of it lies in the rank's file."""

    tensor: ir.TensorProtocol
    placement: Placement
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


@dataclass(frozen=True)
class RankFile:
    """The data file of one of `ranks` ranks; it holds something."""

    path: Path
    rank: int
    ranks: int
    content: Sequence[Placed]


def lay_out(tensors: Sequence[tuple[ir.TensorProtocol, Placement]]) -> list[Placed]:
    """Slices one behind the other, each at the beginning of a page; the same for every rank."""
    placed, end = list[Placed](), 0
    for tensor, placement in tensors:
        placed.append(Placed(tensor, placement, end + -end % _PAGE, slice_bytes(tensor, placement)))
        end = placed[-1].end
    return placed


def write_files(files: Sequence[RankFile]) -> list[FileRecord]:
    """As many at a time as this process has processors. When one fails, the others stop at their next tensor."""
    stop = Event()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(partial(_write, stop=stop), files))
        except BaseException:
            stop.set()
            raise


def _write(file: RankFile, stop: Event) -> FileRecord:
    digest, position = hashlib.sha256(), 0
    with file.path.open("wb", buffering=0) as stream:
        # A full disk shows at once, and ext4 takes the writes with a third less work.
        os.posix_fallocate(stream.fileno(), 0, file.content[-1].end)
        for placed in file.content:
            if stop.is_set():
                break
            gap = np.zeros(placed.offset - position, np.uint8)
            for piece in chain([gap], slices(placed.tensor, placed.placement, file.rank, file.ranks)):
                digest.update(piece.data)
                position += _append(stream, piece)
    return FileRecord(name=file.path.name, bytes=position, sha256=digest.hexdigest())


def _append(stream: FileIO, piece: Buffer) -> int:
    done = 0
    while done < piece.nbytes:
        done += stream.write(piece[done:].data)
    return done


def slices(tensor: ir.TensorProtocol, placement: Placement, rank: int, ranks: int) -> Iterator[Buffer]:
    """The bytes that `rank` holds of the tensor, in order. A piece is valid until the next one is asked for."""
    if not isinstance(placement, Shard):
        yield from _chunks(tensor, [(0, tensor.nbytes)])
        return
    held = spans(placement.blocks, rank, ranks)
    shape = [int(size) for size in tensor.shape.numpy()]
    bits = math.prod(shape[placement.dim + 1 :]) * tensor.dtype.bitwidth  # of one index of the cut dimension
    bounds = [shape[placement.dim], placement.local, *(bound for span in held for bound in span)]
    if any(bound * bits % 8 for bound in bounds):
        yield _unpacked(tensor, placement, held)
        return
    ranges = [(start * bits // 8, stop * bits // 8) for start, stop in held]
    fill = np.zeros(placement.local * bits // 8 - sum(stop - start for start, stop in ranges), np.uint8)
    if math.prod(shape[: placement.dim]) > 1:
        yield from _rows(tensor, shape[placement.dim] * bits // 8, ranges, fill)
        return
    yield from _chunks(tensor, ranges)  # the outermost dimension: a slice is a few ranges of the file
    if len(fill):
        yield fill


def slice_bytes(tensor: ir.TensorProtocol, placement: Placement) -> int:
    """Bytes that one rank holds of the tensor."""
    whole = [int(size) for size in tensor.shape.numpy()]
    return math.ceil(math.prod(int(size) for size in local_shape(whole, placement)) * tensor.dtype.bitwidth / 8)


def _rows(
    tensor: ir.TensorProtocol, row_bytes: int, ranges: Sequence[tuple[int, int]], fill: Buffer
) -> Iterator[Buffer]:
    """An inner dimension is cut: every row gives a piece, and zeros where it ends early."""
    local = sum(stop - start for start, stop in ranges) + len(fill)
    taken = np.empty((0, local), np.uint8)
    for chunk in _chunks(tensor, [(0, tensor.nbytes)], row_bytes):
        rows = chunk.reshape(-1, row_bytes)
        if len(taken) < len(rows):
            taken = np.empty((len(rows), local), np.uint8)
        at = 0
        for start, stop in ranges:
            taken[: len(rows), at : at + stop - start] = rows[:, start:stop]
            at += stop - start
        taken[: len(rows), at:] = fill
        yield taken[: len(rows)].reshape(-1)


def _unpacked(tensor: ir.TensorProtocol, placement: Shard, held: Sequence[tuple[int, int]]) -> Buffer:
    """Elements of under a byte whose slices do not begin at bytes. Such tensors are small."""
    indices = np.concatenate([np.arange(start, stop) for start, stop in held])
    array = tensor.numpy()
    taken = np.take(array, indices, axis=placement.dim)
    zeros = [(0, (placement.local - len(indices)) * (axis == placement.dim)) for axis in range(array.ndim)]
    return np.frombuffer(ir.Tensor(np.pad(taken, zeros), dtype=tensor.dtype).tobytes(), np.uint8)


def _chunks(tensor: ir.TensorProtocol, ranges: Sequence[tuple[int, int]], row: int = 1) -> Iterator[Buffer]:
    """Byte ranges of the tensor in pieces of whole rows."""
    step = max(BUFFER_BYTES // row, 1) * row
    if not isinstance(tensor, ir.ExternalTensor):
        data = np.frombuffer(tensor.tobytes(), np.uint8)
        for start, stop in ranges:
            for at in range(start, stop, step):
                yield data[at : min(at + step, stop)]
        return
    buffer = np.empty(min(step, tensor.nbytes), np.uint8)
    with Path(tensor.path).open("rb", buffering=0) as stream:
        for start, stop in ranges:
            stream.seek((tensor.offset or 0) + start)
            for at in range(start, stop, step):
                piece = buffer[: min(at + step, stop) - at]
                _read_into(stream, piece)
                yield piece


def _read_into(stream: FileIO, piece: Buffer) -> None:
    done = 0
    while done < len(piece):
        count = stream.readinto(piece[done:].data)
        if not count:
            raise EOFError(f"{stream.name} ended {len(piece) - done} bytes early; it changed while it was read")
        done += count
