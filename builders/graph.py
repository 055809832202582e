"""What every ONNX graph must be: valid, standard, and described in full."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.artifacts import FileRecord, GenerationQuality, OnnxGraph, Quality, TensorSpec
from builders.errors import InputError, ParityError
from builders.spec import GraphPrecision

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

OPSET = 24
_INLINE_WEIGHT_BYTES = 1 << 30  # protobuf ends at 2 GiB; larger weights go to a file of their own
GRAPH_FILE = "graph.onnx"  # in the directory of every graph that a stage writes
ALLOWED_DOMAINS = ("", "ai.onnx")


def require_standard(file: Path) -> None:
    """Raises ParityError for an invalid graph, a vendor operator or another opset."""
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{file.name} is not a valid ONNX graph: {error}") from error
    model = onnx.load(str(file), load_external_data=False)
    versions = {item.domain: item.version for item in model.opset_import}
    used = {node.domain for node in model.graph.node} | set(versions)
    foreign = sorted(used - set(ALLOWED_DOMAINS))
    if foreign or versions.get("", 0) != OPSET or model.functions:
        raise ParityError(
            f"{file.name}: domains {sorted(used)}, opset {versions.get('')}, {len(model.functions)} local functions; "
            f"expected standard operators of opset {OPSET} only"
        )


def write_model(model: onnx_ir.Model, file: Path) -> None:
    """With large weights beside the file."""
    import onnx_ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, file, external_data=f"{file.name}.data" if weights > _INLINE_WEIGHT_BYTES else None)


def add_constant(graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    """An initializer of the graph."""
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def record_graph(
    out: Path,
    precision: GraphPrecision,
    quality: Quality | GenerationQuality,
    source_digest: str,
    file: str = GRAPH_FILE,
) -> OnnxGraph:
    """The record of `file` in `out`, which must have passed `require_standard`; all files of `out` belong to it."""
    inputs, outputs, operators = describe(out / file)
    return OnnxGraph(
        directory=out,
        files=tuple(FileRecord.of(path) for path in sorted(out.iterdir())),
        file=file,
        precision=precision,
        opset=OPSET,
        inputs=inputs,
        outputs=outputs,
        operators=operators,
        quality=quality,
        source_digest=source_digest,
    )


def describe(file: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, int]]:
    """Inputs, outputs and the count of each operator. Raises InputError for a file that is no ONNX model."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except DecodeError as error:
        raise InputError(
            f"graph {file}", got="a file that is no ONNX model, or a truncated one", expected="an ONNX model",
            fix="export it again",
        ) from error  # fmt: skip
    counts = Counter(node.op_type for node in graph.node)
    return tuple(map(_spec, graph.input)), tuple(map(_spec, graph.output)), dict(sorted(counts.items()))


def _spec(value: object) -> TensorSpec:
    import onnx

    assert isinstance(value, onnx.ValueInfoProto)
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype, dims=dims)


def fix_dimension(file: Path, name: str, size: int, folder: Path) -> Path:
    """A copy of the graph in `folder` whose dynamic dimension `name` has this size. Weights of their own are linked.

    Raises InputError for a graph without that dimension.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param == name]
    if not dims:
        raise InputError(f"graph {file}", got=f"no dimension {name}", expected="one", fix="export the graph again")
    for dim in dims:
        dim.dim_value = size
    for data in {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
                 if entry.key == "location"}:  # fmt: skip
        (folder / data).symlink_to((file.parent / data).resolve())
    target = folder / file.name
    target.write_bytes(model.SerializeToString())
    return target


def count_weights(file: Path) -> int:
    """Numbers in floating point that the graph holds."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    tensors = onnx.load(str(file), load_external_data=False).graph.initializer
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type in floats)


def flops_per_token(file: Path, length: int) -> float:
    """Multiplications and additions of all matrix products for one text of `length` tokens, over its tokens. Of a graph
    with shapes for all values, as the exporter writes it."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    dims = {value.name: _dims(value.type.tensor_type.shape, length) for value in values}
    dims |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            total += 2 * math.prod(dims[node.output[0]]) * dims[node.input[0]][-1]
        elif node.op_type == "Attention":  # queries with keys, then weights with values
            total += 2 * math.prod(dims[node.input[0]]) * length + 2 * math.prod(dims[node.output[0]]) * length
    return total / length


def _dims(shape: Any, length: int) -> tuple[int, ...]:
    """For one text; whatever else is dynamic counts as its tokens."""
    return tuple(1 if dim.dim_param == "batch" else dim.dim_value or length for dim in shape.dim)
