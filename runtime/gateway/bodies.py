"""A request's body: how much of it is read, and what it may be before anything parses it."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from runtime.gateway.refused import Refused

T = TypeVar("T")
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def require_shallow(body: bytes, depth: int) -> None:
    """Raises Refused for JSON that is nested deeper: parsers recurse. Whole passes in C, whatever the body holds."""
    outside = b"".join(body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    brackets = outside.translate(_ONE_KIND, _NOT_BRACKETS)
    for _ in range(depth):  # each pass takes the innermost level away, everywhere
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise Refused(400, f"the JSON is nested deeper than {depth}, or its brackets do not pair")


def read_json(body: bytes, decoder: msgspec.json.Decoder[T], depth: int) -> T:
    """Raises Refused that names what is wrong with which field."""
    require_shallow(body, depth)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {str(error)[:200]}") from error


def read_one_of(body: bytes, kinds: dict[str, Any], depth: int) -> Any:
    """An object of one of several dialects, told apart by a key that each has alone. Raises as `read_json`."""
    given = read_json(body, _OBJECT, depth)
    found = [name for name in kinds if name in given]
    if len(found) != 1:
        raise Refused(400, f"the body must have exactly one of {', '.join(kinds)}; it has {len(found)}")
    try:
        return msgspec.convert(given, kinds[found[0]])
    except msgspec.ValidationError as error:
        raise _misfit(error) from error


def _misfit(error: msgspec.ValidationError) -> Refused:
    return Refused(400, str(error)[:500], param=_field(str(error)))


def _field(said: str) -> str | None:
    """`Object contains unknown field `tools`` and `Expected `str`, got `int` - at `$.model``."""
    parts = said.split("`")
    if "unknown field" in said and len(parts) > 1:
        return parts[1]
    return parts[-2].removeprefix("$.") if " - at `$." in said else None


def require_plain(headers: dict[bytes, bytes], types: frozenset[bytes]) -> None:
    """Raises Refused for encoded bodies, which may inflate to anything, and for other types than these."""
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise Refused(415, "Content-Encoding is not taken; send the body as it is", close=True)
    given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if given and given not in types:
        expected = " or ".join(sorted(item.decode() for item in types))
        raise Refused(415, f"Content-Type is not taken; send {expected}", close=True)


def declared_size(headers: dict[bytes, bytes]) -> int | None:
    found: Any = headers.get(b"content-length")
    return int(found) if found is not None and found.isdigit() else None
