"""`generate` and `generate_stream` as TensorRT-LLM's clients ask them: a generator's inputs by name, as JSON.

Whatever is asked travels to Triton as a stream: Triton 2.51 hears that a client has left when it next sends, which
without a stream would be at the end. The pieces of an answer that is no stream are joined here.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
import orjson

from runtime.gateway.bodies import read_json
from runtime.gateway.events import EVENTS, event, telling_late, to_the_end
from runtime.gateway.exchange import Exchange
from runtime.gateway.kserve import require_served
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused, no_model
from runtime.gateway.tokens import ServedTokenizers
from runtime.gateway.triton import NUMPY, Facts, Triton

Fields = dict[str, Any]
_BODY = msgspec.json.Decoder(dict[str, Any])
_NUMBERS = {"timeout", "priority"}  # Triton's own, beside the model's inputs
_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
_LARGEST = float(np.finfo(np.float32).max)
_JOINED = ("output_ids", "output_log_probs")  # lists of which each piece has a part


class Generate:
    """Both endpoints. Routes name `whole` and `stream`."""

    def __init__(self, triton: Triton, tokenizers: ServedTokenizers, limits: DoorLimits) -> None:
        self._triton, self._tokenizers, self._limits = triton, tokenizers, limits

    async def whole(self, exchange: Exchange) -> None:
        facts, given, told = await self._asked(exchange)
        found = await exchange.unless_gone(self.joined(facts, {**given, "id": exchange.id}))
        await exchange.answer(orjson.dumps({**found, **told}))

    async def stream(self, exchange: Exchange) -> None:
        facts, given, told = await self._asked(exchange)
        pieces = self.pieces(facts, {**given, "id": exchange.id})
        await exchange.unless_gone(_events(exchange, pieces, told))

    async def _asked(self, exchange: Exchange) -> tuple[Facts, Fields, Fields]:
        """What the model is given, and what the answer repeats of the request."""
        body = read_json(await exchange.body(), _BODY, self._limits.depth)
        facts = await require_served(self._triton, exchange)
        if not facts.generates:
            raise Refused(
                400, f"{self._triton.model} does not generate text; use /v2/models/{self._triton.model}/infer"
            )
        fields = _flat(body)
        own = fields.pop("id", None)
        if own is not None and not isinstance(own, str | int):
            raise Refused(400, "id is neither text nor a number", param="id")
        return facts, read_fields(fields, facts, self._triton.model), {} if own in (None, "") else {"id": str(own)}

    async def joined(self, facts: Facts, fields: Fields) -> Fields:
        """The pieces as one answer."""
        found: Fields = {}
        last: Fields = {}
        async with aclosing(to_the_end(self._triton.generate({**fields, "stream": True}))) as pieces:
            async for last in pieces:
                for name in _JOINED:
                    if name in last:
                        found.setdefault(name, []).extend(_list(last[name]))
                found["text_output"] = found.get("text_output", "") + last["text_output"]
        echo = "" if fields.get("exclude_input_in_output", True) else await self._echo(facts, fields)
        found["text_output"] = echo + found["text_output"]
        return {**last, **{name: _single(value) for name, value in found.items()}}

    async def pieces(self, facts: Facts, fields: Fields) -> AsyncGenerator[Fields, None]:
        """As they come, or one where no stream was asked."""
        if not fields.get("stream", False):
            yield await self.joined(facts, fields)
            return
        async with aclosing(to_the_end(self._triton.generate(fields))) as pieces:
            async for piece in pieces:
                yield piece

    async def _echo(self, facts: Facts, fields: Fields) -> str:
        """The prompt's text, as the model itself would put it before an answer that is no stream."""
        if "text_input" in fields:
            return str(fields["text_input"])
        return (await self._tokenizers.of(facts)).decode([fields["input_ids"]])[0]


async def _events(exchange: Exchange, pieces: AsyncGenerator[Fields, None], told: Fields) -> None:
    """The head goes out with the first piece, so that a request which is refused has its status."""
    async with aclosing(pieces), telling_late(exchange):
        async for piece in pieces:
            if not exchange.started:
                await exchange.start(200, EVENTS)
            await exchange.piece(event(orjson.dumps({**piece, **told})))
    await exchange.piece(b"", last=True)


def _flat(body: Fields) -> Fields:
    """Triton takes inputs at the top and in an object `parameters`. What is null asks for nothing."""
    nested = body.pop("parameters", None) or {}
    if not isinstance(nested, dict):
        raise Refused(400, "parameters is not an object", param="parameters")
    twice = next((name for name in nested if name in body), None)
    if twice is not None:
        raise Refused(400, f"{twice[:64]} stands in the body and in its parameters", param=twice[:64])
    return {name: value for name, value in {**body, **nested}.items() if value is not None}


def read_fields(fields: Mapping[str, Any], facts: Facts, model: str) -> Fields:
    """What the model is given. Raises Refused that names the first field that it does not take."""
    types = {item["name"]: item["datatype"] for item in facts.metadata["inputs"]}
    found: Fields = {}
    for name, value in fields.items():
        if name in types:
            if value != [] or name == "input_ids":
                found[name] = _value(name, value, types[name])
        elif name in _NUMBERS:
            found[name] = _value(name, value, "UINT64")
        elif name == "model":
            if value != model:
                raise no_model(str(value), model)
        elif name not in _SEQUENCES or value:  # clients send them where they mean nothing
            near = difflib.get_close_matches(name[:64], types, 1)
            said = f"unknown field {name[:64]}" + (f"; did you mean {near[0]}?" if near else "")
            raise Refused(400, said, param=name[:64])
    return found


def _value(name: str, value: Any, datatype: str) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(_fits(item, datatype) for item in items):
        kind = "text" if datatype == "BYTES" else datatype
        raise Refused(400, f"{name} is not {kind}, or out of its range", param=name)
    return value


def _fits(item: Any, datatype: str) -> bool:
    if datatype == "BYTES":
        return isinstance(item, str)
    if datatype == "BOOL" or isinstance(item, bool):
        return datatype == "BOOL" and isinstance(item, bool)
    if datatype.startswith("FP"):
        return isinstance(item, int | float) and -_LARGEST <= item <= _LARGEST
    kind: Any = NUMPY[datatype]
    limits = np.iinfo(kind)
    return isinstance(item, int) and int(limits.min) <= item <= int(limits.max)


def _list(value: Any) -> list[Any]:
    """Triton writes a tensor of one element without its brackets."""
    return value if isinstance(value, list) else [value]


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
