"""LlamaIndex: its classes for servers that speak OpenAI's API."""

from __future__ import annotations

from measure.clients.asking import CITIES, HELLO, QUESTION, TOOL, WELCOME, Asks, ServedPair, near, same

CLIENT = "llama-index-llms-openai-like"


def asks(served: ServedPair) -> Asks:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    base = f"{served.text}/v1"
    talker = OpenAILike(
        model="talker", api_base=base, api_key=served.key, is_chat_model=True, is_function_calling_model=True,
        context_window=512, max_retries=0, temperature=0,
    )  # fmt: skip

    def chat() -> None:
        same(talker.chat([ChatMessage(role="user", content=HELLO)]).message.content, WELCOME)

    def chat_stream() -> None:
        pieces = talker.stream_chat([ChatMessage(role="user", content=HELLO)])
        same("".join(piece.delta or "" for piece in pieces), WELCOME)

    def completion() -> None:
        prompt, expected, count = served.greedy[0]
        plain = OpenAILike(
            model="talker", api_base=base, api_key=served.key, is_chat_model=False, max_retries=0, temperature=0,
            max_tokens=count, context_window=512,
        )  # fmt: skip
        same(plain.complete(prompt).text, expected)
        same("".join(piece.delta or "" for piece in plain.stream_complete(prompt)), expected)

    def tools() -> None:
        def weather(city: str) -> str:
            """Tells the weather."""
            return city

        tool = FunctionTool.from_defaults(weather, name=TOOL["name"])
        for required in (True, False):
            got = talker.chat_with_tools([tool], user_msg=QUESTION, tool_required=required)
            calls = talker.get_tool_calls_from_response(got)
            same([(call.tool_name, call.tool_kwargs) for call in calls], [(TOOL["name"], {"city": CITIES[0]})])

    def embeddings() -> None:
        made = OpenAILikeEmbedding(model_name="minilm", api_base=f"{served.vectors}/v1", api_key=served.key)
        texts = [text for text, _ in served.embedded]
        for got, (_, expected) in zip(made.get_text_embedding_batch(texts), served.embedded, strict=True):
            near(got, expected)

    return {
        "chat": chat, "chat, streamed": chat_stream, "complete, whole and streamed": completion,
        "tools, required and auto": tools, "embeddings": embeddings,
    }  # fmt: skip
