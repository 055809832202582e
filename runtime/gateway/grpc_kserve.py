"""KServe's messages over gRPC, turned into what the HTTP side works with, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from runtime.gateway.grpc_wire import INFER, Schema, inflated, require_known
from runtime.gateway.kserve import PARAMETERS, TensorIn, in_range, of_binary, require_parameter
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused
from runtime.gateway.triton import NUMPY, Blob, Facts, pack_texts, unpack_texts

_MOST = 64  # inputs, and outputs
_MOST_TEXTS = 1 << 16  # of one typed input; raw contents take any number
_MOST_DIMS = 16
_LONGEST_NAME, _LONGEST_ID = 128, 256
_FINAL = "triton_enable_empty_final_response"  # the end of what we answer is always marked
_PARAMETERS = {name: kind for name, kind in PARAMETERS.items() if name != "binary_data_output"}  # all is binary here
# Where each datatype's typed contents stand.
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
# What protobuf has of each.
_WIDE = {
    "bool_contents": np.bool_, "int_contents": np.int32, "int64_contents": np.int64, "uint_contents": np.uint32,
    "uint64_contents": np.uint64, "fp32_contents": np.float32, "fp64_contents": np.float64,
}  # fmt: skip


class InferCall:
    """A ModelInferRequest, examined. Raises Refused for whatever of it is not taken."""

    def __init__(self, message: Any) -> None:
        self.model, self.version, self.id = message.model_name, message.model_version, message.id
        if max(len(self.model), len(self.version)) > _LONGEST_NAME or len(self.id) > _LONGEST_ID:
            raise Refused(400, f"a name is longer than {_LONGEST_NAME} characters, or the id than {_LONGEST_ID}")
        if not 1 <= len(message.inputs) <= _MOST or len(message.outputs) > _MOST:
            raise Refused(400, f"the request has {len(message.inputs)} inputs and {len(message.outputs)} outputs")
        self.parameters = _parameters(message.parameters)
        self.outputs = [item.name for item in message.outputs]
        for item in (*message.inputs, *message.outputs):
            other = next(iter(item.parameters), None)
            if other is not None:
                raise Refused(400, f"{item.name[:64]}: parameter {other[:64]!r} is not taken here")
        self.inputs = _blobs(message)

    def fields(self) -> dict[str, Any]:
        """The inputs of a generator, as `generate` takes them. Raises Refused."""
        found: dict[str, Any] = {name: value for name, value in self.parameters.items() if name != "prompt_name"}
        for item in self.inputs:
            if item.shape[:1] != (1,):
                raise Refused(
                    400, f"input {item.name}: shape {list(item.shape)} does not begin with 1: send one prompt"
                )
            if item.name in found:
                raise Refused(400, f"input {item.name} is there twice")
            found[item.name] = _texts(item) if item.datatype == "BYTES" else item.array().ravel().tolist()
        return found


def read_infer(data: bytes, limits: DoorLimits) -> InferCall:
    """Raises Refused."""
    from tritonclient.grpc import service_pb2

    return InferCall(read_message(data, service_pb2.ModelInferRequest, INFER, limits))


def read_message(data: bytes, kind: Any, schema: Schema, limits: DoorLimits) -> Any:
    """Raises Refused for what is compressed too small, unknown, or no such message."""
    from google.protobuf.message import DecodeError

    plain = inflated(data, limits.inflated_bytes)
    require_known(plain, schema)
    try:
        return kind.FromString(plain)
    except DecodeError as error:
        raise Refused(400, "the message cannot be read; texts of it must be UTF-8") from error


def _parameters(given: Mapping[str, Any]) -> dict[str, bool | int | str]:
    found: dict[str, bool | int | str] = {}
    for name, item in given.items():
        kind = item.WhichOneof("parameter_choice")
        value: Any = None if kind is None else getattr(item, kind)
        if name == _FINAL and isinstance(value, bool):
            continue
        require_parameter(name, value, _PARAMETERS)
        found[name] = value
    return found


def _blobs(message: Any) -> list[Blob]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise Refused(400, f"there are {len(raw)} raw_input_contents for {len(message.inputs)} inputs")
    found = []
    for place, item in enumerate(message.inputs):
        if len(item.name) > _LONGEST_NAME or len(item.shape) > _MOST_DIMS or any(size < 0 for size in item.shape):
            raise Refused(400, f"input {item.name[:64]}: the name or the shape is not one that a model has")
        if raw and item.HasField("contents"):
            raise Refused(400, f"input {item.name} has both contents and raw_input_contents")
        if raw:
            found.append(of_binary(TensorIn(item.name, list(item.shape), item.datatype), raw[place]))
        else:
            found.append(Blob(item.name, item.datatype, tuple(item.shape), _packed(item)))
    return found


def _packed(item: Any) -> bytes:
    """Typed contents as they travel. Raises Refused where there are not as many as the shape says."""
    if item.datatype not in _CONTENTS:
        raise Refused(400, f"input {item.name}: {item.datatype[:16]!r} has no typed contents; send raw_input_contents")
    for name, value in item.contents.ListFields():
        if name.name != _CONTENTS[item.datatype]:
            raise Refused(400, f"input {item.name} is {item.datatype}; it has {len(value)} {name.name}")
    values = getattr(item.contents, _CONTENTS[item.datatype])
    if len(values) != math.prod(item.shape) or (item.datatype == "BYTES" and len(values) > _MOST_TEXTS):
        raise Refused(400, f"input {item.name}: {len(values)} elements do not fit shape {list(item.shape)}")
    if item.datatype == "BYTES":
        return pack_texts(values)
    kind: np.dtype[Any] = np.dtype(NUMPY[item.datatype])
    given = np.array(values, _WIDE[_CONTENTS[item.datatype]])
    if kind.kind in "iu" and given.size and not in_range(given, kind):
        raise Refused(400, f"input {item.name} holds numbers that {item.datatype} does not have")
    return bytes(given.astype(kind).tobytes())


def _texts(item: Blob) -> list[str]:
    try:
        return [text.decode() for text in unpack_texts(item.data, math.prod(item.shape))]
    except UnicodeDecodeError as error:
        raise Refused(400, f"input {item.name} is not UTF-8") from error


def infer_response(model: str, version: int, request_id: str, found: Iterable[Blob]) -> Any:
    from tritonclient.grpc import service_pb2

    blobs = list(found)
    kind = service_pb2.ModelInferResponse
    return kind(
        model_name=model, model_version=str(version), id=request_id,
        outputs=[kind.InferOutputTensor(name=one.name, datatype=one.datatype, shape=one.shape) for one in blobs],
        raw_output_contents=[one.data for one in blobs],
    )  # fmt: skip


def stream_response(message: Any, final: bool) -> bytes:
    from tritonclient.grpc import service_pb2

    message.parameters["triton_final_response"].bool_param = final
    return bytes(service_pb2.ModelStreamInferResponse(infer_response=message).SerializeToString())


def stream_error(refused: Refused, request_id: str) -> bytes:
    """An error in a stream has no status of its own: its text begins with it, as a generator's does."""
    from tritonclient.grpc import service_pb2

    text = f"{status_name(refused)}: {refused.message}"
    named = service_pb2.ModelInferResponse(id=request_id)
    return bytes(service_pb2.ModelStreamInferResponse(error_message=text, infer_response=named).SerializeToString())


def piece_blobs(piece: Mapping[str, Any], facts: Facts, asked: list[str]) -> list[Blob]:
    """A generator's piece as tensors again. Their shapes are those of its adapter: all but the text have a batch."""
    types = {item["name"]: item["datatype"] for item in facts.metadata["outputs"]}
    found = []
    for name, datatype in types.items():
        if name not in piece or (asked and name not in asked):
            continue
        values = piece[name] if isinstance(piece[name], list) else [piece[name]]
        shape = (len(values),) if name == "text_output" else (1, len(values))
        if datatype == "BYTES":
            data = pack_texts([text.encode() for text in values])
        else:
            data = np.array(values, NUMPY[datatype]).tobytes()
        found.append(Blob(name, datatype, shape, data))
    return found


def require_outputs(asked: list[str], facts: Facts) -> None:
    """Raises Refused for an output that the model does not have."""
    other = next((name for name in asked if name not in facts.outputs), None)
    if other is not None:
        raise Refused(400, f"no output {other[:64]!r}; the model has {', '.join(sorted(facts.outputs))}")


def status_name(refused: Refused) -> str:
    return _STATUS_NAMES.get(refused.status, "INTERNAL")


# The gRPC status of each of the door's.
_STATUS_NAMES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    405: "UNIMPLEMENTED", 408: "DEADLINE_EXCEEDED", 409: "ABORTED", 413: "RESOURCE_EXHAUSTED", 415: "UNIMPLEMENTED",
    429: "RESOURCE_EXHAUSTED", 431: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip
