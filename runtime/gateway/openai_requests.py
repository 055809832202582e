"""OpenAI's requests, closed to keys that they do not have. What is not built is taken where it asks for nothing, as
clients send it so, and refused by name at any other value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.gateway.refused import Refused

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
Word = Annotated[str, Meta(max_length=256)]
# Values that ask for nothing, by field.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": (), "web_search_options": (), "dimensions": (),
    "service_tier": ("auto", "default"), "store": (False,), "metadata": ({},), "verbosity": (),
}  # fmt: skip


class Closed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    def require_built(self) -> None:
        """Raises Refused that names the first field that asks for what is not built."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name in _NOTHING and value is not None and not _nothing(name, value):
                raise Refused(400, f"{name} is not built here; leave it out", param=name, code="unsupported_parameter")


def _nothing(name: str, value: Any) -> bool:
    """`0 == False` in Python, but `logprobs: 0` asks for something."""
    return any(value == one and type(value) is type(one) for one in _NOTHING[name])


class EmbeddingRequest(Closed, kw_only=True):
    """`prompt_name` chooses one of the model's own prompts; it is not of OpenAI."""

    model: Name
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Any = None
    user: str | None = None
    prompt_name: Name | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(Closed, kw_only=True):
    """What completions and chats share. From `top_k` on, keys that other servers made common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Word | list[Word] | None = None
    seed: int | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    stop_token_ids: list[Token] | None = None
    n: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None

    def fields(self, max_tokens: int | None) -> dict[str, Any]:
        """Inputs of the generator's model, but for the prompt. Raises Refused."""
        self.require_built()
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "stream_options is only for stream: true", param="stream_options")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "max_tokens": max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k in (None, -1) else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "random_seed": None if self.seed is None else self.seed % (1 << 64),
            "min_length": self.min_tokens,
            "stop_words": [word for word in stop if word] or None,
            "stop_token_ids": self.stop_token_ids or None,
        }
        return {name: value for name, value in given.items() if value is not None}


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[Token]]
    max_tokens: Count | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    def prompts(self, most: int) -> list[str | list[int]]:
        """Each as text, or as token ids. Raises Refused."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        found: list[str | list[int]]
        if given and all(isinstance(item, int) for item in given):
            found = [[item for item in given if isinstance(item, int)]]
        else:
            found = [item for item in given if not isinstance(item, int)]
            if len(found) != len(given):
                raise Refused(400, "prompt mixes texts and token ids", param="prompt")
        if not 1 <= len(found) <= most:
            raise Refused(400, f"prompt holds {len(found)} prompts; send 1 to {most}", param="prompt")
        if any(isinstance(item, list) and not (item and max(item) < 1 << 31 and min(item) >= 0) for item in found):
            raise Refused(400, "prompt holds token ids that no model has", param="prompt")
        return found


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Name
    text: str | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Name | None = None
    refusal: None = None

    def rendered(self) -> dict[str, str]:
        """As templates know it: parts are joined. Raises Refused for parts that are no text."""
        text = self.content
        if not isinstance(text, str):
            for part in text:
                if part.type != "text" or part.text is None:
                    raise Refused(400, f"messages: a part of type {part.type[:40]} is not built here", param="messages")
            text = "".join(part.text or "" for part in text)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None
    verbosity: Any = None

    def limit(self) -> int | None:
        """Raises Refused where both names are used for different things."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise Refused(400, "max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return old if new is None else new
