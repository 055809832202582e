"""`/v1/embeddings`: texts to vectors, as numbers or as base64 of their bytes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from runtime.gateway.bodies import read_json
from runtime.gateway.exchange import Exchange, together
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import EmbeddingRequest
from runtime.gateway.refused import Refused
from runtime.gateway.triton import Blob, Facts, Triton, pack_texts

_REQUEST = msgspec.json.Decoder(EmbeddingRequest)
_AT_ONCE = 4  # batches of one request


class Embeddings:
    def __init__(self, triton: Triton, limits: DoorLimits) -> None:
        self._triton, self._limits = triton, limits

    async def __call__(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _REQUEST, self._limits.depth)
        require_model(asked.model, self._triton.model)
        asked.require_built()
        texts = _texts(asked, self._limits.items)
        facts = await self._triton.facts()
        if not facts.embeds or "text" not in facts.inputs:
            raise Refused(400, f"{self._triton.model} does not embed texts", param="model")
        if asked.dimensions not in (None, facts.width):
            said = f"dimensions: vectors of this model have {facts.width} and are not cut here; leave it out"
            raise Refused(400, said, param="dimensions", code="unsupported_parameter")
        vectors, tokens = await exchange.unless_gone(self._vectors(texts, facts, asked.prompt_name, exchange.id))
        await exchange.answer(_reply(self._triton.model, vectors, tokens, asked.encoding_format == "base64"))

    async def _vectors(
        self, texts: Sequence[bytes], facts: Facts, prompt: str | None, request_id: str
    ) -> tuple[NDArray[np.float32], int]:
        """[texts, width], and how many tokens they had."""
        size = facts.max_batch_size or len(texts)
        parameters = {} if prompt is None else {"prompt_name": prompt}
        gate = asyncio.Semaphore(_AT_ONCE)

        async def batch(some: Sequence[bytes]) -> tuple[NDArray[np.float32], int]:
            item = Blob("text", "BYTES", (len(some), 1), pack_texts(some))
            async with gate:
                found = await self._triton.infer([item], ["embedding", "token_count"], request_id, parameters)
            return found["embedding"].array(), int(found["token_count"].array().sum())

        if len(texts) <= size:
            return await batch(texts)
        found = await together([batch(texts[at : at + size]) for at in range(0, len(texts), size)])
        return np.concatenate([vectors for vectors, _ in found]), sum(tokens for _, tokens in found)


def require_model(asked: str, served: str) -> None:
    if asked != served:
        raise Refused(404, f"no model {asked[:64]!r} here; it is {served!r}", param="model", code="model_not_found")


def _texts(asked: EmbeddingRequest, most: int) -> list[bytes]:
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    if not 1 <= len(given) <= most:
        raise Refused(400, f"input holds {len(given)} texts; send 1 to {most}", param="input")
    texts = []
    for item in given:
        if not isinstance(item, str):
            raise Refused(400, "input: token ids are not built here; send text", param="input")
        texts.append(item.encode())
    return texts


def _reply(model: str, vectors: NDArray[np.float32], tokens: int, as_base64: bool) -> bytes:
    rows = [base64.b64encode(row.tobytes()).decode() for row in vectors] if as_base64 else list(vectors)
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY
    )
