"""OpenAI's chats: messages, tools, and the form that an answer is to have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from runtime.gateway.openai_requests import Count, Name, Sampled, TopCount
from runtime.gateway.refused import Refused
from runtime.generation.marked import SCHEMA_BYTES

_ANY_OBJECT = '{"type": "object"}'


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Name
    text: str | None = None


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"

    def rendered(self) -> dict[str, Any]:
        """Templates write the arguments themselves, so they get the object. Raises Refused for what is none."""
        try:
            arguments = orjson.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise Refused(400, "messages: the arguments of a tool call are not a JSON object", param="messages")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None  # what an answer has that a client sends back
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None

    def rendered(self) -> dict[str, Any]:
        """As templates know it: parts are joined. Raises Refused for parts that are no text."""
        if self.content is None and not self.tool_calls:
            raise Refused(400, f"messages: a message of role {self.role} has no content", param="messages")
        if self.annotations or (self.tool_calls and self.role != "assistant"):
            raise Refused(400, f"messages: role {self.role} has tool_calls or annotations", param="messages")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise Refused(400, "messages: tool_call_id belongs to role tool, and to no other", param="messages")
        told: dict[str, Any] = {"role": self.role, "content": self._text()}
        if self.name is not None:
            told["name"] = self.name
        if self.tool_calls:
            told["tool_calls"] = [call.rendered() for call in self.tool_calls]
        if self.tool_call_id is not None:
            told["tool_call_id"] = self.tool_call_id
        return told

    def _text(self) -> str:
        text = self.content or ""
        if isinstance(text, str):
            return text
        for part in text:
            if part.type != "text" or part.text is None:
                raise Refused(400, f"messages: a part of type {part.type[:40]} is not built here", param="messages")
        return "".join(part.text or "" for part in text)


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: the answer always keeps to the schema."""

    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def guide(self) -> str | None:
        """The schema of the answer, as JSON. Raises Refused."""
        if (self.json_schema is None) != (self.type != "json_schema"):
            raise Refused(400, "response_format: json_schema belongs to the type of this name", param="response_format")
        if self.json_schema is None:
            return _ANY_OBJECT if self.type == "json_object" else None
        return written(self.json_schema.schema or {}, "response_format")


def written(schema: dict[str, Any], param: str) -> str:
    """Raises Refused for one that is too large."""
    text = orjson.dumps(schema)
    if len(text) > SCHEMA_BYTES:
        raise Refused(400, f"{param}: the schema has {len(text)} bytes; at most {SCHEMA_BYTES} are taken", param=param)
    return text.decode()


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: a call always keeps to the schema."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"]

    def rendered(self) -> dict[str, Any]:
        """As templates know it."""
        given = {"name": self.function.name, "description": self.function.description}
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        told = {name: value for name, value in given.items() if value is not None}
        return {"type": "function", "function": {**told, "parameters": parameters}}


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    moderation: Any = None
    safety_identifier: str | None = None  # who is behind the request, as `user`
    prompt_cache_key: str | None = None  # which prompts are alike; the cache finds that by itself
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    def limit(self) -> int | None:
        """Raises Refused where both names are used for different things."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise Refused(400, "max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return old if new is None else new

    def scores(self) -> dict[str, Any]:
        """What the generator is asked to tell of tokens. Raises Refused."""
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return {"return_log_probs": True, "top_log_probs": self.top_logprobs or 0} if self.logprobs else {}

    @property
    def may_call(self) -> bool:
        """Whether the model chooses between a text and calls."""
        return self.tool_choice in (None, "auto")

    @property
    def several(self) -> bool:
        """Whether one answer may hold several calls; one that is named is called once."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call, or must; none where it is to be a text. Raises Refused."""
        choice, tools = self.tool_choice, self.tools or []
        if choice == "none" or (not tools and choice in (None, "auto")):
            return []
        if not tools:
            raise Refused(400, "tool_choice needs tools", param="tool_choice")
        if len({tool.function.name for tool in tools}) < len(tools):
            raise Refused(400, "tools: two have the same name", param="tools")
        if self.may_call or choice == "required":
            return tools
        assert isinstance(choice, NamedTool)
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise Refused(
                400, f"tool_choice names {choice.function.name[:64]!r}, which is no tool", param="tool_choice"
            )
        return named
