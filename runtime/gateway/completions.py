"""`/v1/completions` and `/v1/chat/completions`: a generator's pieces in OpenAI's shapes, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from runtime.errors import ServingError
from runtime.gateway.bodies import read_json
from runtime.gateway.chat import ChatTemplates
from runtime.gateway.embeddings import require_model
from runtime.gateway.exchange import Exchange, together
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import ChatRequest, CompletionRequest, Sampled
from runtime.gateway.refused import Refused, as_refused
from runtime.gateway.triton import Triton
from runtime.gateway.upstream import UpstreamGone

_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_DEFAULT_TOKENS = 16  # OpenAI's, of a completion; a chat gets the model's own default
_BROKEN = "the model's server broke off; try again"
_COMPLETION, _CHAT = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
Fields = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How a completion differs from a chat. `first`: a chat's stream begins with the role."""

    chat: bool
    id: str
    model: str
    created: int

    def envelope(self, choices: list[Fields], stream: bool, **more: Any) -> Fields:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more,
        }  # fmt: skip

    def choice(self, text: str, finish: str | None, stream: bool, index: int = 0) -> Fields:
        told = {"index": index, "finish_reason": finish, "logprobs": None}
        if not self.chat:
            return {**told, "text": text}
        if stream:
            return {**told, "delta": {"content": text} if text or finish is None else {}}
        return {**told, "message": {"role": "assistant", "content": text, "refusal": None}}


@dataclass(frozen=True)
class Whole:
    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


class Completions:
    """Both endpoints. Routes name `complete` and `chat`."""

    def __init__(self, triton: Triton, templates: ChatTemplates, limits: DoorLimits) -> None:
        self._triton, self._templates, self._limits = triton, templates, limits

    async def complete(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _COMPLETION, self._limits.depth)
        require_model(asked.model, self._triton.model)
        fields = asked.fields(asked.max_tokens or _DEFAULT_TOKENS)
        prompts = asked.prompts(self._limits.prompts)
        if asked.stream and len(prompts) > 1:
            raise Refused(400, "prompt: a stream takes one prompt", param="prompt")
        await self._require_generator()
        inputs = [{"text_input" if isinstance(one, str) else "input_ids": one, **fields} for one in prompts]
        await self._answer(exchange, asked, inputs, chat=False)

    async def chat(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _CHAT, self._limits.depth)
        require_model(asked.model, self._triton.model)
        fields = asked.fields(asked.limit())
        if len(asked.messages) > self._limits.items:
            raise Refused(400, f"messages: at most {self._limits.items} are taken", param="messages")
        template = self._templates.of(await self._require_generator())
        text = template.render([message.rendered() for message in asked.messages])
        # The template writes the special tokens itself: a tokenizer that adds its own would begin the text twice.
        await self._answer(exchange, asked, [{"text_input": text, "add_special_tokens": False, **fields}], chat=True)

    async def _require_generator(self) -> int:
        """The version. Raises Refused for a model that makes no text."""
        facts = await self._triton.facts()
        if not facts.generates:
            raise Refused(400, f"{self._triton.model} does not generate text", param="model")
        return facts.version

    async def _answer(self, exchange: Exchange, asked: Sampled, inputs: list[Fields], chat: bool) -> None:
        shape = Shape(chat, f"{'chatcmpl' if chat else 'cmpl'}-{exchange.id}", self._triton.model, int(time.time()))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            await exchange.unless_gone(self._stream(exchange, shape, inputs[0], usage))
            return
        wholes = await exchange.unless_gone(self._wholes(inputs))
        choices = [shape.choice(one.text, one.finish, False, index) for index, one in enumerate(wholes)]
        usage_of = _usage(sum(one.prompt_tokens for one in wholes), sum(one.completion_tokens for one in wholes))
        await exchange.answer(orjson.dumps(shape.envelope(choices, False, usage=usage_of)))

    async def _wholes(self, inputs: list[Fields]) -> list[Whole]:
        if len(inputs) == 1:
            return [await self._whole(inputs[0])]
        return await together([self._whole(one) for one in inputs])

    async def _whole(self, fields: Fields) -> Whole:
        """Streamed all the same: Triton 2.51 sees that a client has left when it sends, which would be at the end."""
        texts, last = [], None
        async with aclosing(self._pieces(fields)) as pieces:
            async for piece in pieces:
                texts.append(piece["text_output"])
                last = piece
        assert last is not None
        return Whole("".join(texts), last["finish_reason"], last["prompt_tokens"], last["completion_tokens"])

    async def _pieces(self, fields: Fields) -> AsyncGenerator[Fields, None]:
        """Until the one with `finish_reason`. Raises UpstreamGone when it does not come."""
        finished = False
        async with aclosing(self._triton.generate({**fields, "stream": True})) as pieces:
            async for piece in pieces:
                finished = "finish_reason" in piece
                yield piece
        if not finished:
            raise UpstreamGone("the answer has no end", nothing_came=False)

    async def _stream(self, exchange: Exchange, shape: Shape, fields: Fields, usage: bool) -> None:
        """The head goes out with the first piece, so that a request which is refused has its status."""
        more: Fields = {"usage": None} if usage else {}
        async with aclosing(self._pieces(fields)) as pieces:
            try:
                async for piece in pieces:
                    if not exchange.started:
                        await exchange.start(200, _EVENTS)
                        if shape.chat:
                            first = {
                                "index": 0, "finish_reason": None, "logprobs": None,
                                "delta": {"role": "assistant", "content": ""},
                            }  # fmt: skip
                            await exchange.piece(_sse(shape.envelope([first], True, **more)))
                    text, finish = piece["text_output"], piece.get("finish_reason")
                    if text or finish:
                        choice = shape.choice(text, None if shape.chat and text else finish, True)
                        await exchange.piece(_sse(shape.envelope([choice], True, **more)))
                    if finish and shape.chat and text:  # a chat's last event holds no text
                        await exchange.piece(_sse(shape.envelope([shape.choice("", finish, True)], True, **more)))
                    if finish and usage:
                        counted = _usage(piece["prompt_tokens"], piece["completion_tokens"])
                        await exchange.piece(_sse(shape.envelope([], True, usage=counted)))
            except (ServingError, UpstreamGone) as error:
                if not exchange.started:
                    raise
                told = as_refused(error) if isinstance(error, ServingError) else Refused(503, _BROKEN)
                await exchange.piece(b"data: " + told.body(openai=True) + b"\n\n")
        await exchange.piece(b"data: [DONE]\n\n", last=True)


def _usage(prompt: int, completion: int) -> Fields:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(event: Fields) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"
