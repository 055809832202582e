"""OpenAI's own client: chats, completions, streams, embeddings, tools, forms, log-probabilities, errors by class."""

from __future__ import annotations

import json
from typing import Any

from measure.clients.asking import (
    ANSWER,
    CALLED,
    CITIES,
    HELLO,
    PERSON,
    QUESTION,
    QUESTION_OF_TWO,
    TOOL,
    WELCOME,
    Asks,
    ServedPair,
    near,
    raised,
    require,
    same,
)  # fmt: skip

CLIENT = "openai"
_CHAT: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": HELLO}], "temperature": 0}
_TOOLS: list[Any] = [{"type": "function", "function": TOOL}]
_FORM: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}


def asks(served: ServedPair) -> Asks:
    import openai

    options: dict[str, Any] = {"api_key": served.key, "max_retries": 0, "timeout": 60}
    text = openai.OpenAI(base_url=f"{served.text}/v1", **options)
    vectors = openai.OpenAI(base_url=f"{served.vectors}/v1", **options)

    def models() -> None:
        same([model.id for model in text.models.list().data], ["talker"])
        same(vectors.models.retrieve("minilm").id, "minilm")

    def chat() -> None:
        got = text.chat.completions.create(**_CHAT, max_completion_tokens=40)
        same((got.choices[0].message.content, got.choices[0].finish_reason), (WELCOME, "stop"))
        require(got.usage is not None and got.usage.total_tokens > got.usage.completion_tokens > 3, got.usage)

    def chat_stream() -> None:
        events = list(text.chat.completions.create(**_CHAT, stream=True, stream_options={"include_usage": True}))
        same("".join(event.choices[0].delta.content or "" for event in events if event.choices), WELCOME)
        same([event.choices[0].finish_reason for event in events if event.choices][-1], "stop")
        require(events[-1].usage is not None and not events[-1].choices, events[-1])

    def completions() -> None:
        for prompt, expected, count in served.greedy:
            got = text.completions.create(model="talker", prompt=prompt, max_tokens=count, temperature=0)
            same(got.choices[0].text, expected)

    def completion_stream() -> None:
        prompt, expected, count = served.greedy[0]
        asked: dict[str, Any] = {"model": "talker", "prompt": prompt, "max_tokens": count, "temperature": 0}
        same("".join(event.choices[0].text for event in text.completions.create(**asked, stream=True)), expected)

    def choices() -> None:
        got = text.completions.create(model="talker", prompt="Open the", n=3, seed=7, max_tokens=5, logprobs=2)
        same([choice.index for choice in got.choices], [0, 1, 2])
        require(all(choice.logprobs and len(choice.logprobs.token_logprobs or ()) <= 5 for choice in got.choices), got)

    def chat_logprobs() -> None:
        content = text.chat.completions.create(**_CHAT, logprobs=True, top_logprobs=3).choices[0].logprobs
        require(content is not None and content.content, content)
        same(b"".join(bytes(one.bytes or ()) for one in content.content).decode(), WELCOME)
        require(all(len(one.top_logprobs) == 3 for one in content.content), content)

    def embeddings() -> None:
        texts = [one for one, _ in served.embedded]
        got = vectors.embeddings.create(model="minilm", input=texts)
        for item, (_, expected) in zip(got.data, served.embedded, strict=True):
            near(item.embedding, expected)

    def embeddings_as_floats() -> None:
        one, expected = served.embedded[0]
        near(vectors.embeddings.create(model="minilm", input=one, encoding_format="float").data[0].embedding, expected)

    def form() -> None:
        asked = {**_CHAT, "temperature": 1, "max_tokens": 80, "seed": 1}
        kinds: list[Any] = [_FORM, {"type": "json_object"}]
        for kind in kinds:
            choice = text.chat.completions.create(**asked, response_format=kind).choices[0]
            if choice.finish_reason == "stop" or kind is _FORM:
                require(isinstance(json.loads(choice.message.content or ""), dict), choice)

    def parsed() -> None:
        from pydantic import BaseModel, Field

        class Person(BaseModel):
            name: str = Field(max_length=8)
            age: int = Field(ge=1, le=99)

        got = text.chat.completions.parse(**_CHAT, response_format=Person)
        require(isinstance(got.choices[0].message.parsed, Person), got)

    def tool_required() -> None:
        ask = {**_CHAT, "messages": [{"role": "user", "content": QUESTION}], "tools": _TOOLS}
        got = text.chat.completions.create(**ask, tool_choice="required", max_tokens=80).choices[0]
        same(got.finish_reason, "tool_calls")
        same(_called(got.message), [(TOOL["name"], {"city": CITIES[0]})])

    def tool_auto() -> None:
        ask: dict[str, Any] = {**_CHAT, "tools": _TOOLS, "max_tokens": 90}
        plain = text.chat.completions.create(**ask).choices[0]
        same((plain.message.content, plain.message.tool_calls, plain.finish_reason), (WELCOME, None, "stop"))
        for question, cities in ((QUESTION, CITIES[:1]), (QUESTION_OF_TWO, CITIES)):
            talk: list[Any] = [{"role": "user", "content": question}]
            got = text.chat.completions.create(**{**ask, "messages": talk}).choices[0]
            same((got.finish_reason, got.message.content), ("tool_calls", None))
            same(_called(got.message), [(TOOL["name"], {"city": city}) for city in cities])
        talk = [{"role": "user", "content": QUESTION_OF_TWO}]
        one = text.chat.completions.create(**{**ask, "messages": talk}, parallel_tool_calls=False).choices[0]
        same(_called(one.message), [(TOOL["name"], {"city": CITIES[0]})])

    def tool_result() -> None:
        talk: list[Any] = [{"role": "user", "content": QUESTION}]
        ask: dict[str, Any] = {**_CHAT, "tools": _TOOLS, "messages": talk}
        called = text.chat.completions.create(**ask, max_tokens=90).choices[0].message
        require(called.tool_calls, called)
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": CALLED}
        talk += [called.model_dump(exclude_none=True), result]
        same(text.chat.completions.create(**ask).choices[0].message.content, ANSWER)

    def tool_stream() -> None:
        ask: dict[str, Any] = {**_CHAT, "tools": _TOOLS, "messages": [{"role": "user", "content": QUESTION_OF_TWO}]}
        found: dict[int, list[str]] = {}
        finish = None
        for event in text.chat.completions.create(**ask, stream=True, max_tokens=90):
            finish = event.choices[0].finish_reason or finish
            for call in event.choices[0].delta.tool_calls or ():
                assert call.function is not None
                found.setdefault(call.index, [call.function.name or ""]).append(call.function.arguments or "")
        told = [(parts[0], json.loads("".join(parts[1:]))) for _, parts in sorted(found.items())]
        same((told, finish), ([(TOOL["name"], {"city": city}) for city in CITIES], "tool_calls"))

    def embedding_errors() -> None:
        def ask(**changes: Any) -> object:
            return vectors.embeddings.create(**{"model": "minilm", "input": "x", **changes})

        raised(openai.BadRequestError, "dimensions", lambda: ask(dimensions=7))
        raised(openai.NotFoundError, "no model", lambda: ask(model="other"))
        raised(openai.BadRequestError, "input[0] is empty", lambda: ask(input=""))

    def errors() -> None:
        def ask(**changes: Any) -> object:
            return text.chat.completions.create(**{**_CHAT, **changes})

        raised(openai.BadRequestError, "temperature", lambda: ask(temperature=3))
        raised(openai.BadRequestError, "reasoning_effort", lambda: ask(reasoning_effort="low"))
        raised(openai.NotFoundError, "no model", lambda: ask(model="other"))
        stranger = text.with_options(api_key="another")
        raised(openai.AuthenticationError, "key", lambda: stranger.chat.completions.create(**_CHAT))
        raised(openai.NotFoundError, "no such path", lambda: text.images.generate(prompt="a cat", model="talker"))

    return {
        "models": models, "chat": chat, "chat, streamed": chat_stream, "completions are transformers'": completions,
        "completion, streamed": completion_stream, "n, seed, logprobs": choices,
        "chat log-probabilities": chat_logprobs,
        "embeddings (base64)": embeddings, "embeddings (float)": embeddings_as_floats,
        "response_format": form, "parse() of a pydantic model": parsed, "tool_choice required": tool_required,
        "tool_choice auto: text, one, two calls": tool_auto, "a tool's result goes back": tool_result,
        "tool_choice auto, streamed": tool_stream,
        "errors of embeddings": embedding_errors, "errors by class": errors,
    }  # fmt: skip


def _called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
