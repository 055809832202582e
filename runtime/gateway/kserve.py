"""KServe's protocol, version 2, over HTTP: metadata, and inference that is parsed and built again.

JSON tensors and the binary tensor extension come in; to Triton all tensors travel as binary, and what comes back is
given in the form that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from msgspec import Meta
from numpy.typing import NDArray

from runtime.gateway.bodies import read_json
from runtime.gateway.exchange import JSON_OR_BINARY, Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.model_config import shown_config
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.triton import NUMPY, Blob, Facts, Triton, pack_texts, unpack_texts

Parameters = dict[str, bool | int | float | str]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Size = Annotated[int, Meta(ge=0, le=1 << 31)]
_HEADER = b"inference-header-content-length"
SERVER, EXTENSIONS = "trireme", ["binary_tensor_data"]
# Of a request. What else there is maps memory, schedules sequences, or means nothing here.
PARAMETERS = {"binary_data_output": bool, "prompt_name": str, "timeout": int, "priority": int}
_JSON_TYPES = {"BOOL": "b", "F": "iuf", "I": "iu", "U": "iu"}  # kinds of numpy's arrays that each takes


class TensorIn(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    shape: Annotated[list[Size], Meta(max_length=16)]
    datatype: Name
    data: list[Any] | None = None
    parameters: Parameters = {}


class TensorOut(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: Annotated[list[TensorIn], Meta(min_length=1, max_length=64)]
    id: Annotated[str, Meta(max_length=256)] = ""
    parameters: Parameters = {}
    outputs: Annotated[list[TensorOut], Meta(max_length=64)] = []


_REQUEST = msgspec.json.Decoder(InferRequest)


class Kserve:
    """The endpoints of the one model that is served."""

    def __init__(self, triton: Triton, limits: DoorLimits) -> None:
        self._triton, self._limits = triton, limits

    async def server(self, exchange: Exchange) -> None:
        await exchange.answer(orjson.dumps({"name": SERVER, "version": "2", "extensions": EXTENSIONS}))

    async def metadata(self, exchange: Exchange) -> None:
        facts = await require_served(self._triton, exchange)
        await exchange.answer(orjson.dumps({**facts.metadata, "versions": [str(facts.version)]}))

    async def config(self, exchange: Exchange) -> None:
        await exchange.answer(orjson.dumps(shown_config(await require_served(self._triton, exchange))))

    async def ready(self, exchange: Exchange) -> None:
        await require_served(self._triton, exchange)
        if not await self._triton.ready():
            raise Refused(503, "the model is not ready")
        await exchange.answer(b"", headers=[])

    async def infer(self, exchange: Exchange) -> None:
        body = await exchange.body(JSON_OR_BINARY)
        facts = await require_served(self._triton, exchange)
        if facts.generates:
            raise Refused(400, f"{self._triton.model} streams; use /v1/completions, generate or generate_stream")
        asked, inputs = self._read(body, exchange.headers.get(_HEADER))
        names = [item.name for item in asked.outputs]
        passed = {key: value for key, value in asked.parameters.items() if key != "binary_data_output"}
        found = await exchange.unless_gone(self._triton.infer(inputs, names, exchange.id, passed))
        binary = bool(asked.parameters.get("binary_data_output", False))
        in_binary = {item.name: bool(item.parameters.get("binary_data", binary)) for item in asked.outputs}
        header, blobs = _outputs(found.values(), in_binary, binary)
        told = {
            "model_name": self._triton.model, "model_version": str(facts.version),
            **({"id": asked.id} if asked.id else {}), "outputs": header,
        }  # fmt: skip
        text = orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)
        kind = b"application/octet-stream" if blobs else b"application/json"
        length = [(_HEADER, str(len(text)).encode())] if blobs else []
        await exchange.answer(b"".join((text, *blobs)), headers=[(b"content-type", kind), *length])

    def _read(self, body: bytes, header: bytes | None) -> tuple[InferRequest, list[Blob]]:
        """Raises Refused."""
        length = len(body) if header is None else int(header) if header.isdigit() else -1
        if not 0 < length <= len(body):
            raise Refused(400, "Inference-Header-Content-Length is not the length of a part of the body")
        asked = read_json(body[:length], _REQUEST, self._limits.depth)
        _require_parameters(asked)
        place, inputs = length, []
        for item in asked.inputs:
            size = item.parameters.get("binary_data_size")
            if size is None:
                inputs.append(_of_json(item))
                continue
            if type(size) is not int or not 0 <= size <= len(body) - place:
                raise Refused(400, f"input {item.name}: binary_data_size is not the size of a part of the body")
            inputs.append(of_binary(item, body[place : place + size]))
            place += size
        if place != len(body):
            raise Refused(400, f"{len(body) - place} bytes of the body belong to no input")
        return asked, inputs


async def require_served(triton: Triton, exchange: Exchange) -> Facts:
    """Of the model that the path names. Raises Refused for another, or another version than the one that serves."""
    return await require_version(triton, exchange.parts["name"], exchange.parts.get("version", ""))


async def require_version(triton: Triton, name: str, version: str) -> Facts:
    """As `require_served`; no version is any."""
    require_model(name, triton.model)
    facts = await triton.facts()
    if version not in ("", str(facts.version)):
        raise Refused(404, f"version {version[:16]!r} does not serve; {facts.version} does")
    return facts


def _require_parameters(asked: InferRequest) -> None:
    for name, value in asked.parameters.items():
        require_parameter(name, value, PARAMETERS)
    taken = [(f"input {item.name}", item.parameters, "binary_data_size") for item in asked.inputs]
    taken += [(f"output {item.name}", item.parameters, "binary_data") for item in asked.outputs]
    for what, parameters, name in taken:
        other = next((key for key in parameters if key != name), None)
        if other is not None:
            raise Refused(400, f"{what}: parameter {other[:64]!r} is not taken here")


def require_parameter(name: str, value: Any, known: Mapping[str, type]) -> None:
    if name not in known or type(value) is not known[name]:
        raise Refused(400, f"parameter {name[:64]!r} is not taken here, or not as {type(value).__name__}")
    if isinstance(value, int) and value < 0:
        raise Refused(400, f"parameter {name!r} is {value}; send 0 or more")


def _count(item: TensorIn) -> int:
    return math.prod(item.shape)


def of_binary(item: TensorIn, data: bytes) -> Blob:
    if item.data is not None:
        raise Refused(400, f"input {item.name} has both data and binary_data_size")
    if item.datatype == "BYTES":
        try:
            fits = len(unpack_texts(data, _count(item))) == _count(item)
        except ValueError:
            fits = False
    else:
        fits = _count(item) * np.dtype(_numpy_type(item)).itemsize == len(data)
    if not fits:
        raise Refused(400, f"input {item.name}: {len(data)} bytes are not {item.datatype} of shape {item.shape}")
    return Blob(item.name, item.datatype, tuple(item.shape), data)


def _numpy_type(item: TensorIn) -> type[np.generic]:
    if item.datatype not in NUMPY:
        raise Refused(
            400, f"input {item.name}: no datatype {item.datatype[:16]!r}; use one of {', '.join(NUMPY)}, BYTES"
        )
    return NUMPY[item.datatype]


def _of_json(item: TensorIn) -> Blob:
    if item.data is None:
        raise Refused(400, f"input {item.name} has neither data nor binary_data_size")
    wrong = Refused(400, f"input {item.name}: data does not fit {item.datatype[:16]} of shape {item.shape}")
    if item.datatype == "BYTES":
        texts = list(_flat(item.data))
        if len(texts) != _count(item) or not all(isinstance(text, str) for text in texts):
            raise wrong
        return Blob(item.name, "BYTES", tuple(item.shape), pack_texts([text.encode() for text in texts]))
    kind = np.dtype(_numpy_type(item))
    try:
        given = np.array(item.data, np.object_ if item.datatype == "UINT64" else None)  # else 2^63 and more are floats
    except (ValueError, OverflowError) as error:
        raise wrong from error
    takes = _JSON_TYPES[item.datatype if item.datatype == "BOOL" else item.datatype[0]]
    fits = given.dtype.kind in takes or (given.dtype == np.object_ and all(type(one) is int for one in given.flat))
    if given.size != _count(item) or (given.size and not fits):
        raise wrong
    if kind.kind in "iu" and given.size and not in_range(given, kind):
        raise wrong
    return Blob(item.name, item.datatype, tuple(item.shape), given.astype(kind).tobytes())


def in_range(given: NDArray[Any], kind: np.dtype[Any]) -> bool:
    """numpy would wrap what does not fit."""
    limits = np.iinfo(kind)
    return bool(int(given.min()) >= limits.min and int(given.max()) <= limits.max)


def _flat(data: list[Any]) -> Iterable[Any]:
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)  # no deeper than the limit
        else:
            yield item


def _outputs(
    found: Iterable[Blob], in_binary: dict[str, bool], binary: bool
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The header's lines, and the binary data behind it."""
    lines: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for item in found:
        line: dict[str, Any] = {"name": item.name, "datatype": item.datatype, "shape": item.shape}
        if in_binary.get(item.name, binary):
            line["parameters"] = {"binary_data_size": len(item.data)}
            blobs.append(item.data)
        else:
            line["data"] = _json_data(item)
        lines.append(line)
    return lines, blobs


def _json_data(item: Blob) -> Any:
    if item.datatype == "BYTES":
        try:
            return [text.decode() for text in unpack_texts(item.data, math.prod(item.shape))]
        except UnicodeDecodeError as error:
            raise Refused(400, f"output {item.name} is not text; ask for binary_data") from error
    if item.datatype not in NUMPY or item.datatype == "FP16":
        raise Refused(400, f"output {item.name} has no form in JSON; ask for binary_data")
    return item.array().ravel()
