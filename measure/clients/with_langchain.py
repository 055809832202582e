"""LangChain: its chat model, agents' tools and structured output, completions and embeddings."""

from __future__ import annotations

from typing import Any

from measure.clients.asking import (
    ANSWER,
    CALLED,
    CITIES,
    HELLO,
    PERSON,
    QUESTION,
    TOOL,
    WELCOME,
    Asks,
    ServedPair,
    near,
    require,
    same,
)  # fmt: skip

CLIENT = "langchain-openai"


def asks(served: ServedPair) -> Asks:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    options: dict[str, Any] = {"base_url": f"{served.text}/v1", "api_key": served.key, "max_retries": 0}
    chat = ChatOpenAI(model="talker", temperature=0, **options)
    tools = [{"type": "function", "function": TOOL}]

    def invoke() -> None:
        got = chat.invoke(HELLO)
        same((got.content, got.response_metadata["finish_reason"]), (WELCOME, "stop"))
        require(got.usage_metadata["output_tokens"] > 3, got.usage_metadata)

    def streamed() -> None:
        same("".join(piece.content for piece in chat.stream(HELLO)), WELCOME)

    def batched() -> None:
        same([one.content for one in chat.batch([HELLO] * 3)], [WELCOME] * 3)

    def structured() -> None:
        schema = {"title": "person", "description": "A person.", **PERSON}
        for method in ("json_schema", "function_calling"):
            got = chat.with_structured_output(schema, method=method, strict=True).invoke("Who is there?")
            same(sorted(got), ["age", "name"])

    def forced_tool() -> None:
        got = chat.bind_tools(tools, tool_choice="any").invoke(QUESTION)
        same([(call["name"], call["args"]) for call in got.tool_calls], [(TOOL["name"], {"city": CITIES[0]})])

    def agent() -> None:
        """The model chooses to call, is told the result, and answers."""
        bound = chat.bind_tools(tools)
        same(bound.invoke(HELLO).content, WELCOME)
        asked = HumanMessage(QUESTION)
        called = bound.invoke([asked])
        same([(call["name"], call["args"]) for call in called.tool_calls], [(TOOL["name"], {"city": CITIES[0]})])
        result = ToolMessage(CALLED, tool_call_id=called.tool_calls[0]["id"])
        same(bound.invoke([asked, called, result]).content, ANSWER)

    def completion() -> None:
        prompt, expected, count = served.greedy[0]
        same(OpenAI(model="talker", temperature=0, max_tokens=count, **options).invoke(prompt), expected)

    def embeddings() -> None:
        made = OpenAIEmbeddings(
            model="minilm", base_url=f"{served.vectors}/v1", api_key=served.key, check_embedding_ctx_length=False
        )
        texts = [text for text, _ in served.embedded]
        for got, (_, expected) in zip(made.embed_documents(texts), served.embedded, strict=True):
            near(got, expected)
        near(made.embed_query(texts[0]), served.embedded[0][1])

    return {
        "invoke": invoke, "stream": streamed, "batch": batched, "with_structured_output": structured,
        "bind_tools, any": forced_tool, "bind_tools, auto, and a result": agent, "OpenAI (completion)": completion,
        "OpenAIEmbeddings": embeddings,
    }  # fmt: skip
