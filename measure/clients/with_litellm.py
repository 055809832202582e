"""LiteLLM, which many proxies are made of: chats, completions, embeddings, and reranking by three providers' names."""

from __future__ import annotations

import json
from typing import Any

from measure.clients.asking import (
    CITIES,
    DOCUMENTS,
    HELLO,
    QUESTION,
    SOUGHT,
    TOOL,
    WELCOME,
    Asks,
    ServedPair,
    near,
    raised,
    same,
)  # fmt: skip

CLIENT = "litellm"


def asks(served: ServedPair) -> Asks:
    import litellm

    litellm.telemetry = False
    options: dict[str, Any] = {"api_base": f"{served.text}/v1", "api_key": served.key, "num_retries": 0}
    hello: dict[str, Any] = {"messages": [{"role": "user", "content": HELLO}], "temperature": 0}

    def chat() -> None:
        for provider in ("openai", "hosted_vllm"):
            got = litellm.completion(model=f"{provider}/talker", **hello, **options)
            same((got.choices[0].message.content, got.choices[0].finish_reason), (WELCOME, "stop"))

    def chat_stream() -> None:
        pieces = litellm.completion(model="openai/talker", stream=True, **hello, **options)
        same("".join(piece.choices[0].delta.content or "" for piece in pieces), WELCOME)

    def tools() -> None:
        asked = {**hello, "messages": [{"role": "user", "content": QUESTION}]}
        shown = [{"type": "function", "function": TOOL}]
        for choice in ("required", "auto"):
            got = litellm.completion(model="openai/talker", tools=shown, tool_choice=choice, **asked, **options)
            [call] = got.choices[0].message.tool_calls
            same((call.function.name, json.loads(call.function.arguments)), (TOOL["name"], {"city": CITIES[0]}))

    def completion() -> None:
        prompt, expected, count = served.greedy[0]
        got = litellm.text_completion(
            model="text-completion-openai/talker", prompt=prompt, max_tokens=count, temperature=0, **options
        )
        same(got.choices[0].text, expected)

    def embeddings() -> None:
        texts = [text for text, _ in served.embedded]
        got = litellm.embedding(
            model="openai/minilm", input=texts, api_base=f"{served.vectors}/v1", api_key=served.key,
            encoding_format="float",
        )  # fmt: skip
        for item, (_, expected) in zip(got.data, served.embedded, strict=True):
            near(item["embedding"], expected)

    def reranks() -> None:
        places = {"cohere": "/v2/rerank", "jina_ai": "/v1/rerank", "hosted_vllm": "/v1/rerank"}
        for provider, path in places.items():
            got = litellm.rerank(
                model=f"{provider}/minilm", query=SOUGHT, documents=DOCUMENTS, top_n=2,
                api_base=f"{served.vectors}{path}", api_key=served.key,
            )  # fmt: skip
            same((got.results[0]["index"], len(got.results)), (1, 2))

    def errors() -> None:
        def ask(**changes: Any) -> object:
            return litellm.completion(**{"model": "openai/talker", **hello, **options, **changes})

        raised(litellm.AuthenticationError, "key", lambda: ask(api_key="another"))
        raised(litellm.BadRequestError, "temperature", lambda: ask(temperature=3))
        raised(litellm.NotFoundError, "no model", lambda: ask(model="openai/other"))

    return {
        "chat, as openai and hosted_vllm": chat, "chat, streamed": chat_stream, "tools, required and auto": tools,
        "text_completion": completion, "embedding": embeddings, "rerank: cohere, jina_ai, vllm": reranks,
        "errors by class": errors,
    }  # fmt: skip
