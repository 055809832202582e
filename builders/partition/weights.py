"""Slices of weights, streamed from the source file to the files of the ranks.

No tensor is ever in memory whole: rows go through a buffer of 4 MiB, and every byte of a tensor that is cut is read
once. Files are hashed while they are written.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.artifacts import FileRecord
from builders.partition.placement import Placement, Shard, local_shape, spans

BUFFER_BYTES = 4 << 20
_BUFFERS = 4
_PAGE = 4096  # external data is mapped page by page
Buffer = NDArray[np.uint8]


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in a data file."""

    offset: int
    bytes: int


class DataFile:
    """Appends tensors at page boundaries and hashes what it writes, on a thread of its own."""

    def __init__(self, path: Path, stream: BinaryIO, thread: ThreadPoolExecutor) -> None:
        self.path, self.position = path, 0
        self._stream, self._digest, self._thread = stream, hashlib.sha256(), thread

    def align(self) -> int:
        self.append(np.zeros(-self.position % _PAGE, np.uint8))
        return self.position

    def append(self, data: Buffer) -> Future[None]:
        """`data` must stay as it is until the result is there."""
        self.position += data.nbytes
        return self._thread.submit(self._write, data)

    def record(self) -> FileRecord:
        """Waits for everything appended so far."""
        self._thread.submit(lambda: None).result()
        return FileRecord(name=self.path.name, bytes=self.position, sha256=self._digest.hexdigest())

    def _write(self, data: Buffer) -> None:
        self._digest.update(data.data)
        done = 0
        while done < data.nbytes:
            done += self._stream.write(data[done:].data)


@contextmanager
def data_files(paths: Sequence[Path]) -> Iterator[list[DataFile]]:
    with ExitStack() as stack:
        streams = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in paths]  # end before their streams close
        yield [DataFile(*each) for each in zip(paths, streams, threads, strict=True)]


def write_slices(tensor: ir.TensorProtocol, placement: Placement, files: Sequence[DataFile]) -> Extent:
    """Each rank's slice into its file, at the same offset in all of them."""
    offset = {file.align() for file in files}.pop()
    pending: deque[Future[None]] = deque()
    for rank, data in slices(tensor, placement, len(files)):
        pending.append(files[rank].append(data))
        while len(pending) > _BUFFERS - 2:  # one more is being filled, and one is in hand
            pending.popleft().result()
    for future in pending:
        future.result()
    return Extent(offset, files[0].position - offset)


def slices(tensor: ir.TensorProtocol, placement: Placement, ranks: int) -> Iterator[tuple[int, Buffer]]:
    """(rank, next bytes of its slice), in the order of the file."""
    if not isinstance(placement, Shard):
        for chunk in _chunks(tensor, [(0, tensor.nbytes)]):
            for rank in range(ranks):
                yield rank, chunk
        return
    held = [spans(placement.blocks, rank, ranks) for rank in range(ranks)]
    shape = [int(size) for size in tensor.shape.numpy()]
    outer = math.prod(shape[: placement.dim])
    bits = math.prod(shape[placement.dim + 1 :]) * tensor.dtype.bitwidth  # of one index of the cut dimension
    bounds = [shape[placement.dim], placement.local, *(bound for ranges in held for span in ranges for bound in span)]
    if any(bound * bits % 8 for bound in bounds):
        yield from _unpacked(tensor, placement, held)
        return
    ranges_of = [[(start * bits // 8, stop * bits // 8) for start, stop in ranges] for ranges in held]
    if outer == 1:
        yield from _contiguous(tensor, ranges_of, placement.local * bits // 8)
    else:
        yield from _rows(tensor, shape[placement.dim] * bits // 8, ranges_of, placement.local * bits // 8)


def slice_bytes(tensor: ir.TensorProtocol, placement: Placement) -> int:
    """Bytes that one rank holds of the tensor."""
    whole = [int(size) for size in tensor.shape.numpy()]
    return math.ceil(math.prod(int(size) for size in local_shape(whole, placement)) * tensor.dtype.bitwidth / 8)


def _contiguous(
    tensor: ir.TensorProtocol, held: list[list[tuple[int, int]]], local_bytes: int
) -> Iterator[tuple[int, Buffer]]:
    """The outermost dimension is cut: a slice is a few ranges of the file, and zeros where it ends early."""
    for ranges in {tuple(ranges): None for ranges in held}:
        owners = [rank for rank, each in enumerate(held) if tuple(each) == ranges]
        for chunk in _chunks(tensor, ranges):
            for rank in owners:
                yield rank, chunk
        zeros = np.zeros(local_bytes - sum(stop - start for start, stop in ranges), np.uint8)
        for rank in owners if len(zeros) else ():
            yield rank, zeros


def _rows(
    tensor: ir.TensorProtocol, row_bytes: int, held: list[list[tuple[int, int]]], local_bytes: int
) -> Iterator[tuple[int, Buffer]]:
    """An inner dimension is cut: every row gives a piece to every rank, and zeros where it ends early."""
    for chunk in _chunks(tensor, [(0, tensor.nbytes)], row_bytes):
        rows = chunk.reshape(-1, row_bytes)
        for rank, ranges in enumerate(held):
            pieces = [rows[:, start:stop] for start, stop in ranges]
            zeros = local_bytes - sum(stop - start for start, stop in ranges)
            if zeros:
                pieces.append(np.zeros((len(rows), zeros), np.uint8))
            yield (
                rank,
                np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)).reshape(-1),
            )


def _unpacked(
    tensor: ir.TensorProtocol, placement: Shard, held: list[list[tuple[int, int]]]
) -> Iterator[tuple[int, Buffer]]:
    """Elements of under a byte whose slices do not begin at bytes. Such tensors are small."""
    array = tensor.numpy()
    for rank, ranges in enumerate(held):
        indices = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        taken = np.take(array, indices, axis=placement.dim)
        zeros = [(0, (placement.local - len(indices)) * (axis == placement.dim)) for axis in range(array.ndim)]
        piece = ir.Tensor(np.pad(taken, zeros), dtype=tensor.dtype)
        yield rank, np.frombuffer(piece.tobytes(), np.uint8)


def _chunks(tensor: ir.TensorProtocol, ranges: Sequence[tuple[int, int]], row: int = 1) -> Iterator[Buffer]:
    """Byte ranges of the tensor in pieces of whole rows. A piece is valid until _BUFFERS - 1 more were asked for."""
    step = max(BUFFER_BYTES // row, 1) * row
    if not isinstance(tensor, ir.ExternalTensor):
        data = np.frombuffer(tensor.tobytes(), np.uint8)
        for start, stop in ranges:
            for at in range(start, stop, step):
                yield data[at : min(at + step, stop)]
        return
    buffers = cycle([np.empty(min(step, tensor.nbytes), np.uint8) for _ in range(_BUFFERS)])
    with Path(tensor.path).open("rb", buffering=0) as stream:
        for start, stop in ranges:
            stream.seek((tensor.offset or 0) + start)
            for at in range(start, stop, step):
                piece = next(buffers)[: min(at + step, stop) - at]
                _read_into(stream, piece)
                yield piece


def _read_into(stream: FileIO, piece: Buffer) -> None:
    done = 0
    while done < len(piece):
        count = stream.readinto(piece[done:].data)
        if not count:
            raise EOFError(f"{stream.name} ended {len(piece) - done} bytes early; it changed while it was read")
        done += count
