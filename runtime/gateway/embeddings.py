"""`/v1/embeddings`: texts to vectors, as numbers or as base64 of their bytes."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import orjson
from numpy.typing import NDArray

from runtime.gateway.batches import encoded
from runtime.gateway.bodies import read_json
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import EmbeddingRequest
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.triton import Triton

_REQUEST = msgspec.json.Decoder(EmbeddingRequest)


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
        outputs = ("embedding", "token_count")
        work = encoded(self._triton, facts, {"text": texts}, outputs, exchange.id, asked.prompt_name)
        found = await exchange.unless_gone(work)
        vectors, tokens = found["embedding"], int(found["token_count"].sum())
        await exchange.answer(_reply(self._triton.model, vectors, tokens, asked.encoding_format == "base64"))


def _texts(asked: EmbeddingRequest, most: int) -> list[str]:
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    if not 1 <= len(given) <= most:
        raise Refused(400, f"input holds {len(given)} texts; send 1 to {most}", param="input")
    texts = []
    for item in given:
        if not isinstance(item, str):
            raise Refused(400, "input: token ids are not built here; send text", param="input")
        texts.append(item)
    return texts


def _reply(model: str, vectors: NDArray[Any], tokens: int, as_base64: bool) -> bytes:
    rows = [base64.b64encode(row.tobytes()).decode() for row in vectors] if as_base64 else list(vectors)
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY
    )
