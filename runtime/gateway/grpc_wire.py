"""A gRPC message before protobuf sees it: inflated within a bound, and walked byte by byte.

Small messages can be large ones: gzip inflates, and an empty field of two bytes becomes an object of a hundred. So what
is not known, nested where nothing nests, or more than a request has, is refused before anything is made of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from runtime.gateway.refused import Refused

# Fields by their number; a mapping where a message is nested, None for what is a value.
Schema = Mapping[int, "Schema | None"]
_VALUE: Schema = {1: None, 2: None, 3: None, 4: None, 5: None}
_PARAMETERS: Schema = {1: None, 2: _VALUE}
EMPTY: Schema = {}
MODEL: Schema = {1: None, 2: None}
INFER: Schema = {
    1: None, 2: None, 3: None, 4: _PARAMETERS,
    5: {1: None, 2: None, 3: None, 4: _PARAMETERS, 5: None},  # inputs; typed contents are one value here
    6: {1: None, 2: _PARAMETERS},  # outputs
    7: None,
}  # fmt: skip
_MOST_FIELDS = 1024  # a request of 64 inputs with all that they have needs fewer
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_COMPRESSED = (0x1F, 0x78)  # how gzip and zlib begin; no field of these messages does
_AS_EITHER = 47  # zlib's word for gzip or zlib


def inflated(message: bytes, most: int) -> bytes:
    """The message as it was before its client compressed it. Raises Refused where that is more than `most`."""
    if message[:1] == b"" or message[0] not in _COMPRESSED:
        return message
    reader = zlib.decompressobj(_AS_EITHER)
    try:
        found = reader.decompress(message, most + 1)
    except zlib.error as error:
        raise Refused(400, "the message is neither protobuf nor gzip nor deflate") from error
    if len(found) > most:
        raise Refused(413, f"the compressed message is larger than {most} bytes; send it as it is")
    if not reader.eof or reader.unused_data:
        raise Refused(400, "the compressed message is cut off, or goes on behind its end")
    return found


def require_known(message: bytes, schema: Schema) -> None:
    """Raises Refused for a message with other fields than these, with too many, or that is none."""
    left = _walk(message, 0, len(message), schema, _MOST_FIELDS)
    if left < 0:
        raise Refused(400, f"the message has more than {_MOST_FIELDS} fields")


def _walk(data: bytes, place: int, end: int, schema: Schema, left: int) -> int:
    """How many fields more there may be; negative when there were too many."""
    while place < end:
        left -= 1
        if left < 0:
            return left
        tag, place = _varint(data, place, end)
        number, kind = tag >> 3, tag & 7
        if number not in schema:
            raise Refused(400, f"the message has a field {number}, which is not known here")
        nested = schema[number]
        if kind == _VARINT and nested is None:
            _, place = _varint(data, place, end)
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind) if nested is None else None
        if kind == _BYTES:
            size, place = _varint(data, place, end)
        if size is None or size > end - place:
            raise Refused(400, f"field {number} of the message is not of its type, or cut off")
        if nested is not None:
            left = _walk(data, place, place + size, nested, left)
            if left < 0:
                return left
        place += size
    return left


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """The number, and the place behind it."""
    found = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        place += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found, place
    raise Refused(400, "the message is cut off in a number, or holds one that is too long")
