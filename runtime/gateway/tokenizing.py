"""`/tokenize`, `/detokenize` (and `/decode`): what a model makes of a text, in TEI's shape and in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import orjson

from runtime.gateway.batches import require_unicode
from runtime.gateway.bodies import read_one_of
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import Name
from runtime.gateway.openai_requests import Token as TokenId
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.tokens import ServedTokenizer, ServedTokenizers, Token
from runtime.gateway.triton import Triton


class TeiTokenize(msgspec.Struct, forbid_unknown_fields=True):
    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    model: Name | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TeiDecode(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[TokenId | list[TokenId]]
    skip_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[TokenId]
    model: Name | None = None


class Tokenizing:
    """Routes name `tokenize` and `detokenize`."""

    def __init__(self, triton: Triton, tokenizers: ServedTokenizers, limits: DoorLimits) -> None:
        self._triton, self._tokenizers, self._limits = triton, tokenizers, limits

    async def tokenize(self, exchange: Exchange) -> None:
        kinds = {"inputs": TeiTokenize, "prompt": TokenizeRequest}
        asked = read_one_of(await exchange.body(), kinds, self._limits.depth)
        own = await self._tokenizers.of(await self._triton.facts())
        if isinstance(asked, TeiTokenize):
            texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
            before = own.prompt(asked.prompt_name)
            rows = await self._tokens(own, [f"{before}{text}" for text in texts], asked.add_special_tokens, "inputs")
            await exchange.answer(orjson.dumps(rows))
            return
        require_model(asked.model or self._triton.model, self._triton.model)
        [row] = await self._tokens(own, [asked.prompt], asked.add_special_tokens, "prompt")
        told = {"count": len(row), "max_model_len": own.max_length, "tokens": [token.id for token in row]}
        strings = {"token_strs": [token.text for token in row]} if asked.return_token_strs else {}
        await exchange.answer(orjson.dumps({**told, **strings}))

    async def _tokens(self, own: ServedTokenizer, texts: Sequence[str], special: bool, name: str) -> list[list[Token]]:
        size = sum(map(len, texts))
        if not 1 <= len(texts) <= self._limits.items or size > self._limits.tokenized:
            most = f"1 to {self._limits.items} texts of {self._limits.tokenized} characters together"
            raise Refused(413 if texts else 400, f"{name}: {len(texts)} texts of {size} characters; send {most}")
        for text in texts:
            require_unicode(text, name)
        return await self._tokenizers.tokens(own, texts, special)

    async def detokenize(self, exchange: Exchange) -> None:
        kinds = {"ids": TeiDecode, "tokens": DetokenizeRequest}
        asked = read_one_of(await exchange.body(), kinds, self._limits.depth)
        own = await self._tokenizers.of(await self._triton.facts())
        if isinstance(asked, DetokenizeRequest):
            require_model(asked.model or self._triton.model, self._triton.model)
            rows, skip = [asked.tokens], False
        else:
            rows, skip = _rows(asked.ids), asked.skip_special_tokens
        count = sum(map(len, rows))
        if not rows or count > self._limits.tokenized:
            raise Refused(413 if rows else 400, f"{count} ids; send 1 to {self._limits.tokenized}")
        texts = own.decode(rows, skip)
        told = {"prompt": texts[0]} if isinstance(asked, DetokenizeRequest) else texts
        await exchange.answer(orjson.dumps(told))


def _rows(ids: Sequence[int | list[int]]) -> list[list[int]]:
    """One list, or a list of them."""
    rows = [one for one in ids if isinstance(one, list)]
    if rows and len(rows) != len(ids):
        raise Refused(400, "ids mixes ids and lists of them", param="ids")
    return rows or ([[one for one in ids if isinstance(one, int)]] if ids else [])
