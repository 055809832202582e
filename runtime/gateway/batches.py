"""Texts to an encoder's outputs, in batches of the model's size."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.gateway.exchange import together
from runtime.gateway.refused import Refused
from runtime.gateway.triton import Blob, Facts, Triton, pack_texts

_PLACE = re.compile(r"^text\[(\d+)\]")
_AT_ONCE = 4  # batches of one request
Arrays = dict[str, NDArray[Any]]
READ = ("token_count", "truncated")  # what an encoder tells of how it read each row


async def encoded(
    triton: Triton, facts: Facts, columns: Mapping[str, Sequence[str] | Sequence[bytes]], outputs: Sequence[str],
    request_id: str, prompt: str | None = None,
) -> Arrays:  # fmt: skip
    """`outputs` of all rows; `columns` are inputs of one length, by name, of texts or of token ids as `pack_ids` makes
    them. `prompt`: the name of one of the model's."""
    count = len(next(iter(columns.values())))
    size = facts.max_batch_size or count
    parameters = {} if prompt is None else {"prompt_name": prompt}

    async def batch(at: int) -> Arrays:
        rows = {name: [_bytes(text) for text in texts[at : at + size]] for name, texts in columns.items()}
        inputs = [Blob(name, "BYTES", (len(texts), 1), pack_texts(texts)) for name, texts in rows.items()]
        try:
            found = await triton.infer(inputs, outputs, request_id, parameters)
        except Refused as refused:
            raise _of_all(refused, at) from None
        return {name: found[name].array() for name in outputs}

    if count <= size:
        return await batch(0)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def behind_gate(at: int) -> Arrays:
        async with gate:
            return await batch(at)

    parts = await together([behind_gate(at) for at in range(0, count, size)])
    return {name: np.concatenate([part[name] for part in parts]) for name in outputs}


def _of_all(refused: Refused, before: int) -> Refused:
    """A model numbers the texts of a batch; their sender those of a request."""
    refused.message = _PLACE.sub(lambda found: f"text[{int(found[1]) + before}]", refused.message)
    return refused


def _bytes(item: str | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.encode()


def require_texts(texts: Sequence[str], name: str, most: int) -> None:
    """Raises Refused that names the text which no model takes."""
    if not 1 <= len(texts) <= most:
        raise Refused(400, f"{name} holds {len(texts)} texts; send 1 to {most}", param=name)
    for place, text in enumerate(texts):
        if not text or text.isspace():
            said = f"{name}[{place}] is empty; send at least one character that is not white space"
            raise Refused(400, said, param=name)
        require_unicode(text, name)


def require_unicode(text: str, name: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"{name} holds half of a surrogate pair, which is no text", param=name) from error


def require_whole(truncated: NDArray[Any], name: str, or_else: str = "") -> None:
    """Raises Refused for texts that the model read only the beginning of, where nobody said that it may. `or_else`:
    what it may be instead that is too long."""
    cut = truncated.tobytes().find(1)
    if cut >= 0:
        said = f"{name}[{cut}] has more tokens than the model takes{or_else}"
        raise Refused(413, f"{said}; shorten it, or send truncate: true", param=name)
