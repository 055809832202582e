"""`/v1/completions` and `/v1/chat/completions`: a generator's pieces in OpenAI's shapes, whole or as events."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec
import orjson

from runtime.gateway.bodies import read_json
from runtime.gateway.call_forms import CallForm
from runtime.gateway.chat import ChatTemplates
from runtime.gateway.chat_requests import ChatRequest, Tool
from runtime.gateway.choices import AnswerChoice, AskedPrompt, Fields, Shape
from runtime.gateway.events import EVENTS, event, telling_late, to_the_end
from runtime.gateway.exchange import Exchange, together
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import CompletionRequest, Sampled
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.tools import call_schema
from runtime.gateway.trip import TRIP
from runtime.gateway.triton import Triton

_DEFAULT_TOKENS = 16  # OpenAI's, of a completion; a chat gets the model's own default
_COMPLETION, _CHAT = msgspec.json.Decoder(CompletionRequest), msgspec.json.Decoder(ChatRequest)
_GUIDE = "guided_decoding_guide"
# Inputs of the generator's model that have another name in a request, and fields of a request that are such inputs.
_FIELDS = {
    "stop_words": "stop", "random_seed": "seed", "min_length": "min_tokens", "logit_bias_ids": "logit_bias",
    "logit_bias_values": "logit_bias", "return_prompt_log_probs": "echo", "top_log_probs": "logprobs",
}  # fmt: skip
_SAME = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids",
)  # fmt: skip
_NAME = re.compile(r"[a-z]+(?:_[a-z]+)+")
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a prompt's choices: odd, so no two of them meet
Take = Callable[[AnswerChoice, Fields], Awaitable[None]]


class Completions:
    """Both endpoints. Routes name `complete` and `chat`."""

    def __init__(self, triton: Triton, templates: ChatTemplates, limits: DoorLimits) -> None:
        self._triton, self._templates, self._limits = triton, templates, limits

    async def complete(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _COMPLETION, self._limits.depth)
        require_model(asked.model, self._triton.model)
        fields = asked.fields(_DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens) | asked.scores()
        given = asked.prompts(self._limits.prompts)
        await self._require_generator()
        inputs, prompts = [], []
        for one in given:
            text = one if isinstance(one, str) else None
            own = {"text_input" if text is not None else "input_ids": one, **fields}
            if asked.echo and text is None:
                own["return_prompt_log_probs"] = True  # which brings its text
            inputs.append(own)
            prompts.append(AskedPrompt(text, bool(asked.echo)))
        await self._answer(exchange, asked, inputs, prompts, self._shape(exchange, chat=False, told=asked.told))

    async def chat(self, exchange: Exchange) -> None:
        asked = read_json(await exchange.body(), _CHAT, self._limits.depth)
        require_model(asked.model, self._triton.model)
        fields = asked.fields(asked.limit()) | asked.scores()
        if len(asked.messages) > self._limits.items:
            raise Refused(400, f"messages: at most {self._limits.items} are taken", param="messages")
        tools = asked.callable_tools()
        template = self._templates.of(await self._require_generator())
        form = template.call_form(chosen=asked.may_call) if tools else None
        guide = _guide(asked, tools, form)
        shown = [tool.rendered() for tool in asked.tools or ()] if tools else None
        text = template.render([message.rendered() for message in asked.messages], shown)
        # The template writes the special tokens itself: a tokenizer that adds its own would begin the text twice.
        given = {"text_input": text, "add_special_tokens": False, **fields, **guide}
        shape = self._shape(exchange, chat=True, told=bool(asked.logprobs), calls=form, must=not asked.may_call)
        await self._answer(exchange, asked, [given], [AskedPrompt()], shape)

    async def _require_generator(self) -> int:
        """The version. Raises Refused for a model that makes no text."""
        facts = await self._triton.facts()
        if not facts.generates:
            raise Refused(400, f"{self._triton.model} does not generate text", param="model")
        return facts.version

    def _shape(
        self, exchange: Exchange, *, chat: bool, told: bool, calls: CallForm | None = None, must: bool = False
    ) -> Shape:
        id_ = f"{'chatcmpl' if chat else 'cmpl'}-{exchange.id}"
        return Shape(chat, id_, self._triton.model, int(time.time()), told, calls, must and calls is not None)

    async def _answer(
        self, exchange: Exchange, asked: Sampled, inputs: list[Fields], prompts: list[AskedPrompt], shape: Shape
    ) -> None:
        """Choices are numbered prompt by prompt."""
        count = asked.n or 1
        choices = [AnswerChoice(shape, prompts[index // count], index) for index in range(len(inputs) * count)]
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            await exchange.unless_gone(self._stream(exchange, shape, inputs, choices, usage))
            return

        async def take(choice: AnswerChoice, piece: Fields) -> None:
            choice.add(piece)

        await exchange.unless_gone(self._run(inputs, choices, take))
        found = [choice.whole() for choice in choices]
        await exchange.answer(orjson.dumps(shape.envelope(found, False, usage=_usage(choices, count))))

    async def _run(self, inputs: list[Fields], choices: list[AnswerChoice], take: Take) -> None:
        """Gives every piece of every choice to `take`. The first failure ends them all, and is raised."""
        count = len(choices) // len(inputs)
        parts = [choices[at : at + count] for at in range(0, len(choices), count)]
        work = [self._of_prompt(fields, part, take) for fields, part in zip(inputs, parts, strict=True)]
        if len(work) == 1:
            await work[0]
        else:
            await together(work)
        TRIP.get().tokens_in = _read_tokens(choices, count)

    async def _of_prompt(self, fields: Fields, choices: list[AnswerChoice], take: Take) -> None:
        """The prompt is read once: the other choices begin when the first has, and find it in the cache."""
        if len(choices) == 1:
            await self._one(fields, choices[0], take)
            return
        begun = asyncio.Event()

        async def other(place: int) -> None:
            await begun.wait()
            own = {
                name: value for name, value in fields.items() if name != "return_prompt_log_probs" or _unmade(fields)
            }
            if "random_seed" in fields:
                own["random_seed"] = (fields["random_seed"] + place * _SEED_STEP) % (1 << 64)
            await self._one(own, choices[place], take)

        await together([self._one(fields, choices[0], take, begun), *map(other, range(1, len(choices)))])

    async def _one(self, fields: Fields, choice: AnswerChoice, take: Take, begun: asyncio.Event | None = None) -> None:
        """Streamed all the same: Triton 2.51 sees that a client has left when it sends, which would be at the end."""
        try:
            async with aclosing(to_the_end(self._triton.generate({**fields, "stream": True}))) as pieces:
                async for piece in pieces:
                    await take(choice, piece)
                    if begun is not None and (piece["text_output"] or "finish_reason" in piece):
                        begun.set()
        except Refused as refused:
            raise _by_its_own_name(refused, choice) from None

    async def _stream(
        self, exchange: Exchange, shape: Shape, inputs: list[Fields], choices: list[AnswerChoice], usage: bool
    ) -> None:
        """The head goes out with the first piece, so that a request which is refused has its status."""
        more: Fields = {"usage": None} if usage else {}
        one_by_one = asyncio.Lock()  # nothing may overtake the head

        async def take(choice: AnswerChoice, piece: Fields) -> None:
            deltas = choice.deltas(piece)
            async with one_by_one:
                if not exchange.started:
                    await exchange.start(200, EVENTS)
                for delta in deltas:
                    await exchange.piece(event(orjson.dumps(shape.envelope([delta], True, **more))))

        async with telling_late(exchange):
            await self._run(inputs, choices, take)
            if usage:
                counted = _usage(choices, len(choices) // len(inputs))
                await exchange.piece(event(orjson.dumps(shape.envelope([], True, usage=counted))))
        await exchange.piece(event(b"[DONE]"), last=True)


def _by_its_own_name(refused: Refused, choice: AnswerChoice) -> Refused:
    """A model names its inputs; their sender knows the fields that they came in."""
    if refused.status != 400:
        return refused
    if refused.message.startswith(_GUIDE):  # words of a schema are its sender's own
        return Refused(400, refused.message.replace(_GUIDE, choice.form), param=choice.form)
    names = {**_FIELDS, "text_input": choice.source, "input_ids": choice.source}
    said = _NAME.sub(lambda found: names.get(found[0], found[0]), refused.message)
    first = said.removeprefix("the ").partition(" ")[0].partition("=")[0]
    known = {"prompt": choice.source, **{name: name for name in (*_SAME, *names.values())}}
    return Refused(400, said, param=known.get(first, refused.param))


def _unmade(fields: Fields) -> bool:
    """Nothing follows the prompt: such a request is one that scores it."""
    return fields.get("max_tokens") == 0


def _guide(asked: ChatRequest, tools: Sequence[Tool], form: CallForm | None) -> Fields:
    """Inputs of the generator that hold an answer to a schema. Raises Refused for what would not go together."""
    guide = None if asked.response_format is None else asked.response_format.guide()
    kind = "json_schema"
    if form is not None:
        if guide is not None:
            raise Refused(400, "response_format: the answer may be a call of a tool", param="response_format")
        if asked.logprobs:
            raise Refused(400, "logprobs of a call of a tool are not built here", param="logprobs")
        kind = "marked_json"
        guide = form.guide(call_schema(tools, form), several=asked.several, must=not asked.may_call)
    if guide is None:
        return {}
    for name in ("stop", "stop_token_ids", "min_tokens"):
        if getattr(asked, name):
            raise Refused(400, f"{name}: it would cut the JSON that the answer is to be; leave it out", param=name)
    return {f"{_GUIDE}_type": kind, _GUIDE: guide}


def _read_tokens(choices: Sequence[AnswerChoice], count: int) -> int:
    """Each prompt counts once, however many choices it has."""
    return sum(int(choice.last["prompt_tokens"]) for choice in choices[::count])


def _usage(choices: Sequence[AnswerChoice], count: int) -> Fields:
    firsts = [choice.last for choice in choices[::count]]
    prompt = _read_tokens(choices, count)
    completion = sum(choice.last["completion_tokens"] for choice in choices)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(last.get("cached_tokens", 0) for last in firsts)},
    }  # fmt: skip
