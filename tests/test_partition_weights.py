"""Slices of weights: what is streamed is what numpy would cut."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.partition import weights
from builders.partition.placement import REPLICATE, Block, Placement, Shard, spans
from builders.partition.weights import data_files, slices, write_slices
from tests.partition_plain import Shape, transformer


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
        found = [
            b"".join(piece.tobytes() for owner, piece in slices(tensor, placement, 4) if owner == rank)
            for rank in range(4)
        ]
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
    placements = [Shard(1, (Block(32, 2), Block(64, 2))), Shard(0, (Block(64, 2),)), REPLICATE]
    with data_files([tmp_path / "r0", tmp_path / "r1"]) as files:
        extents = [write_slices(tensor, placement, files) for placement in placements]
        records = [file.record() for file in files]
    for rank in range(2):
        content = (tmp_path / f"r{rank}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == records[rank].sha256
        for extent, placement in zip(extents, placements, strict=True):
            assert extent.offset % 4096 == 0
            assert (
                content[extent.offset : extent.offset + extent.bytes] == expected(array, placement, rank, 2).tobytes()
            )


def test_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 60)
    tensor = ir.ExternalTensor("source", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([16]), name="w", base_dir=tmp_path)
    with pytest.raises(EOFError, match="4 bytes early"):
        list(slices(tensor, REPLICATE, 1))


@pytest.mark.slow
def test_memory_stays_far_under_the_weights(tmp_path: Path) -> None:
    """A fresh process, because the peak of this one is what other tests left."""
    shape = Shape(heads=16, kv_heads=4, head_dim=64, hidden=1024, ffn=8192, layers=10, vocabulary=32000,
                  attention="operator", gate="separate", norm="rms", head=True, bias=False, qkv="split")  # fmt: skip
    graph = transformer(shape, tmp_path / "big.onnx", external=True)
    weight_bytes = graph.with_name("big.onnx.data").stat().st_size
    assert weight_bytes > 1 << 30
    script = (
        "import sys; from pathlib import Path; from builders.partition.shard import partition_graph; "
        "partition_graph(Path(sys.argv[1]), 2, 2, Path(sys.argv[2])); "
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"  # ru_maxrss counts the parent too
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(graph), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) * 1024 < weight_bytes / 4
