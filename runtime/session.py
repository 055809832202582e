"""Every ONNX Runtime session on a CPU is opened here, so that references, checks and services compute alike."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

# Without VNNI, products of unsigned by signed bytes add pairs in 16 bits, and saturate: a right INT8 graph then seems
# wrong. With this entry ONNX Runtime multiplies unsigned by unsigned bytes. Its rewriting takes no weights in blocks
# (they get a zero point of the wrong rank), so graphs of weights alone, whose products are others, go without.
_EXACT_INT8 = ("session.x64quantprecision", "1")
_QUANTISES = b"\x22\x0eQuantizeLinear"  # protobuf: NodeProto.op_type, 14 bytes
_DYNAMIC = b"\x22\x15DynamicQuantizeLinear"  # 21 bytes
# What the zero points of FP8 activations are called. ONNX Runtime takes QuantizeLinear to FP8 for one to INT8, makes a
# product of bytes of it, and then refuses the graph; with this entry it computes operator by operator.
FP8_ZERO = "zero_e4m3fn"
_AS_WRITTEN = ("session.disable_quant_qdq", "1")
_IN_BLOCKS = b"\x0a\x0ablock_size"  # AttributeProto.name, 10 bytes


def open_session(
    graph: Path | bytes, *, threads: int = 0, entries: Iterable[tuple[str, str]] = (), optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A graph on the CPU. `threads` 0: every core; `entries`: ONNX Runtime's session config entries.

    `optimized`: where to write the graph as ONNX Runtime runs it. Raises ONNX Runtime's own, unrelated errors.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in (*_entries_for(graph), *entries):
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    model = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _entries_for(graph: Path | bytes) -> tuple[tuple[str, str], ...]:
    """Read from the bytes: a server has no ONNX library. A file that cannot be read is left to ONNX Runtime's error."""
    if isinstance(graph, bytes):
        return _entries(graph)
    try:
        with graph.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _entries(content)
    except (OSError, ValueError):  # ValueError: an empty file
        return ()


def _entries(content: bytes | mmap.mmap) -> tuple[tuple[str, str], ...]:
    if content.find(FP8_ZERO.encode()) >= 0:
        return (_AS_WRITTEN,)
    if content.find(_DYNAMIC) >= 0:  # unsigned products take a third longer, and with VNNI signed ones are exact too
        return () if multiplies_bytes() else (_EXACT_INT8,)
    return (_EXACT_INT8,) if content.find(_QUANTISES) >= 0 and content.find(_IN_BLOCKS) < 0 else ()


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this CPU adds products of bytes in 32 bits: VNNI. Where Linux does not say, it is taken not to."""
    file = Path("/proc/cpuinfo")
    return file.is_file() and "vnni" in file.read_text()
