"""`/v1/embeddings`: texts to vectors, as numbers or as base64 of their bytes."""

from __future__ import annotations

from binascii import b2a_base64
from typing import Any

import msgspec
import orjson
from numpy.typing import NDArray

from runtime.gateway.batches import READ, encoded, require_texts, require_whole
from runtime.gateway.bodies import read_json
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import EmbeddingRequest
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.triton import Triton
from runtime.token_rows import pack_ids

_REQUEST = msgspec.json.Decoder(EmbeddingRequest)


class Embeddings:
    def __init__(self, triton: Triton, limits: DoorLimits) -> None:
        self._triton, self._limits = triton, limits

    async def __call__(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _REQUEST, self._limits.depth)
        require_model(asked.model, self._triton.model)
        asked.require_built()
        rows = _rows(asked, self._limits.items)
        if isinstance(rows[0], str):
            require_texts([row for row in rows if isinstance(row, str)], "input", self._limits.items)
        facts = await self._triton.facts()
        if not facts.embeds or "text" not in facts.inputs:
            raise Refused(400, f"{self._triton.model} does not embed texts", param="model")
        if asked.dimensions not in (None, facts.width):
            said = f"dimensions: vectors of this model have {facts.width} and are not cut here; leave it out"
            raise Refused(400, said, param="dimensions", code="unsupported_parameter")
        outputs = ("embedding", *READ)
        work = encoded(self._triton, facts, {"text": rows}, outputs, exchange.id, asked.prompt_name)
        try:
            found = await exchange.unless_gone(work)
        except Refused as refused:
            named = _by_its_own_name(refused)
            raise _about_ids(named) if isinstance(rows[0], bytes) and named.status == 400 else named from None
        if not asked.truncate:
            require_whole(found["truncated"], "input")
        vectors, tokens = found["embedding"], exchange.trip.tokens_in or 0
        await exchange.answer(_reply(self._triton.model, vectors, tokens, asked.encoding_format == "base64"))


def _rows(asked: EmbeddingRequest, most: int) -> list[str] | list[bytes]:
    """Texts, or lists of token ids, packed. Raises Refused."""
    given: list[Any] = [asked.input] if isinstance(asked.input, str) else asked.input
    if given and all(isinstance(item, int) for item in given):
        given = [given]
    if not 1 <= len(given) <= most:
        raise Refused(400, f"input holds {len(given)} texts; send 1 to {most}", param="input")
    if all(isinstance(item, str) for item in given):
        return given
    if not all(isinstance(item, list) for item in given):
        raise Refused(400, "input mixes texts and token ids", param="input")
    if asked.prompt_name is not None:
        raise Refused(
            400, "prompt_name goes before texts, and input holds token ids; leave it out", param="prompt_name"
        )
    return [pack_ids(ids) for ids in given]


def _by_its_own_name(refused: Refused) -> Refused:
    """The model's input is the request's `input`."""
    if refused.message.startswith("text["):
        return Refused(refused.status, "input" + refused.message.removeprefix("text"), param="input")
    if refused.message.startswith("prompt_name "):
        return Refused(refused.status, refused.message, param="prompt_name")
    return refused


def _about_ids(refused: Refused) -> Refused:
    """Most who send ids do not know it: their client counts with the tokenizer of another model."""
    said = refused.message
    if "not valid UTF-8" in said:
        said = "this version of the model was built before it took token ids; build it again, or send text"
    return Refused(
        400, f"{said}. Token ids are those of /tokenize, special tokens included; LangChain sends another model's "
        "unless it is told check_embedding_ctx_length=False", param="input",
    )  # fmt: skip


def _reply(model: str, vectors: NDArray[Any], tokens: int, as_base64: bool) -> bytes:
    rows = [b2a_base64(row, newline=False).decode() for row in vectors] if as_base64 else list(vectors)
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY
    )
