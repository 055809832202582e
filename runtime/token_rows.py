"""Token ids where a text could stand: in the input of an encoder, which is of bytes.

A row of ids begins with a byte that begins no UTF-8, so that no text is ever read as ids, nor ids as a text, by a model
of before, a cache of answers or anybody else. Behind it stand the ids, each in four bytes, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MARK = b"\xff"


def pack_ids(ids: Sequence[int]) -> bytes:
    """`ids`: 0 to 2^31 - 1."""
    return _MARK + struct.pack(f"<{len(ids)}i", *ids)


def holds_ids(row: bytes) -> bool:
    return row.startswith(_MARK)


def unpack_ids(row: bytes) -> list[int] | None:
    """None for a row that is a text. Raises ValueError for ids that are cut off."""
    if not holds_ids(row):
        return None
    count, rest = divmod(len(row) - 1, 4)
    if rest:
        raise ValueError(f"{len(row) - 1} bytes hold no whole number of ids")
    return list(struct.unpack(f"<{count}i", row[1:]))
