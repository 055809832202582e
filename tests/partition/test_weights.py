"""Slices of weights: what is streamed is what numpy would cut."""

from __future__ import annotations

import hashlib
import resource
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.partition.cut import weights
from builders.partition.cut.shard import partition_graph
from builders.partition.cut.weights import RankFile, lay_out, slices, write_files
from builders.partition.placement import REPLICATE, Block, Placement, Shard, spans
from builders.partition.prove.verify import verify_partition
from measure.bench.decoder_graph import DecoderShape, write_decoder
from measure.bench.shard import shard_once


def expected(array: np.ndarray, placement: Placement, rank: int, ranks: int) -> np.ndarray:  # type: ignore[type-arg]
    if not isinstance(placement, Shard):
        return array
    pieces = [np.take(array, range(*span), axis=placement.dim) for span in spans(placement.blocks, rank, ranks)]
    piece = np.concatenate(pieces, axis=placement.dim)
    zeros = placement.local - piece.shape[placement.dim]
    return np.pad(piece, [(0, zeros * (axis == placement.dim)) for axis in range(array.ndim)])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    dim=st.integers(0, 2),
    parts=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "float16", "int8", "int4"]),
    buffer=st.sampled_from([1, 7, 64, 1 << 20]),
    odd=st.booleans(),
)
def test_slices_are_those_of_numpy(
    sizes: tuple[int, int, int], dim: int, parts: list[int], dtype: str, buffer: int, odd: bool
) -> None:
    shape = list(sizes)
    blocks = tuple(Block(4 * sizes[dim], each) for each in parts) if not odd else (Block(4 * sizes[dim] + 1, 4),)
    shape[dim] = sum(block.size for block in blocks)
    numbers = np.random.default_rng(0).integers(-8, 8, shape)
    array = numbers.astype(ml_dtypes.int4 if dtype == "int4" else dtype)
    tensor = ir.Tensor(array, dtype=ir.DataType.INT4 if dtype == "int4" else None)
    placement = Shard(dim, blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BUFFER_BYTES", buffer)
        found = [b"".join(piece.tobytes() for piece in slices(tensor, placement, rank, 4)) for rank in range(4)]
    for rank in range(4):
        piece = expected(array, placement, rank, 4)
        assert found[rank] == ir.Tensor(piece, dtype=tensor.dtype).tobytes()


def test_external_tensors_stream_to_aligned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BUFFER_BYTES", 4096)
    array = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    (tmp_path / "source").write_bytes(b"x" * 100 + array.tobytes())
    tensor = ir.ExternalTensor(
        "source", 100, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w", base_dir=tmp_path
    )
    placements: list[Placement] = [Shard(1, (Block(32, 2), Block(64, 2))), Shard(0, (Block(64, 2),)), REPLICATE]
    content = lay_out([(tensor, placement) for placement in placements])
    records = write_files([RankFile(tmp_path / f"r{rank}", rank, 2, content) for rank in range(2)])
    for rank, record in enumerate(records):
        written = (tmp_path / record.name).read_bytes()
        assert (record.name, record.bytes) == (f"r{rank}", len(written))
        assert hashlib.sha256(written).hexdigest() == record.sha256
        for placed in content:
            assert placed.offset % 4096 == 0
            assert written[placed.offset : placed.end] == expected(array, placed.placement, rank, 2).tobytes()


def test_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 60)
    tensor = ir.ExternalTensor("source", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([16]), name="w", base_dir=tmp_path)
    with pytest.raises(EOFError, match="4 bytes early"):
        list(slices(tensor, REPLICATE, 0, 1))


def test_full_disk_shows_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page more than the limit of this process's files stands for a full disk."""
    array = np.ones((64, 96), np.float32)
    (tmp_path / "source").write_bytes(array.tobytes())
    tensor = ir.ExternalTensor(
        "source", 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w", base_dir=tmp_path
    )
    files = [RankFile(tmp_path / "r0", 0, 1, lay_out([(tensor, REPLICATE)]))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (array.nbytes - 4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_files(files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "r0").stat().st_size == 0


@pytest.mark.slow
def test_memory_stays_far_under_the_weights(tmp_path: Path) -> None:
    graph = tmp_path / "big.onnx"
    weight_bytes = write_decoder(DecoderShape(layers=4), graph)
    assert weight_bytes > 1 << 30
    run = shard_once(graph, 2, 2, tmp_path / "out")
    assert run.peak_bytes < weight_bytes / 4


def test_big_model_of_the_benchmark_is_a_sound_decoder(tmp_path: Path) -> None:
    shape = DecoderShape(layers=1, hidden=32, heads=4, kv_heads=2, ffn=64, vocabulary=96)
    graph = tmp_path / "small.onnx"
    size = write_decoder(shape, graph)
    assert size == 4 * (2 * 96 * 32 + 32 * 32 * 3 + 3 * 32 * 64 + 3 * 32)
    partition_graph(graph, 2, 1, tmp_path / "out")
    assert verify_partition(tmp_path / "out", graph).collectives == {"all_gather": 1, "all_reduce": 3}
