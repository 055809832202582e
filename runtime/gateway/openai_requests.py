"""OpenAI's requests, closed to keys that they do not have. What is not built is taken where it asks for nothing, as
clients send it so, and refused by name at any other value.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runtime.gateway.refused import Refused

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Choices = Annotated[int, Meta(ge=1, le=8)]
TopCount = Annotated[int, Meta(ge=0, le=20)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
Word = Annotated[str, Meta(max_length=256)]
_LEAST_SHARE = 1e-9  # holds the likeliest token alone, as OpenAI has it of 0, which samplers refuse
# Values that ask for nothing, by field.
NOTHING: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "functions": ([],), "function_call": ("none",), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": (), "web_search_options": (),
    "service_tier": ("auto", "default"), "store": (False,), "metadata": ({},), "verbosity": (),
    "moderation": (), "prompt_cache_options": ({},), "prompt_cache_retention": ("in_memory",),
}  # fmt: skip


@cache
def _unbuilt(kind: type[Closed]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name in NOTHING)


class Closed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    def require_built(self) -> None:
        """Raises Refused that names the first field that asks for what is not built."""
        for name in _unbuilt(type(self)):
            value = getattr(self, name)
            if value is not None and not _nothing(name, value):
                raise Refused(400, f"{name} is not built here; leave it out", param=name, code="unsupported_parameter")


def _nothing(name: str, value: Any) -> bool:
    """`0 == False` in Python, but `store: 0` is no answer to whether."""
    return any(value == one and type(value) is type(one) for one in NOTHING[name])


class EmbeddingRequest(Closed, kw_only=True):
    """`prompt_name` chooses one of the model's own prompts, `truncate` lets it read the beginning of a text that is too
    long; they are TEI's."""

    model: Name
    input: str | list[str | Token | list[Token]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: str | None = None
    prompt_name: Name | None = None
    truncate: bool | None = None


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
    n: Choices | None = None
    logit_bias: dict[str, Bias] | None = None
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
            "top_p": _LEAST_SHARE if self.top_p == 0 else self.top_p,
            "top_k": None if self.top_k in (None, -1) else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "random_seed": None if self.seed is None else self.seed % (1 << 64),
            "min_length": self.min_tokens,
            "stop_words": [word for word in stop if word] or None,
            "stop_token_ids": self.stop_token_ids or None,
            **self._biases(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def _biases(self) -> dict[str, Any]:
        if not self.logit_bias:
            return {}
        if not all(token.isdecimal() and token.isascii() and len(token) < 10 for token in self.logit_bias):
            raise Refused(400, "logit_bias: its keys are token ids of the model, as strings", param="logit_bias")
        ids = [int(token) for token in self.logit_bias]
        return {"logit_bias_ids": ids, "logit_bias_values": list(self.logit_bias.values())}


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[Token]]
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
    logprobs: TopCount | bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: Any = None

    def scores(self) -> dict[str, Any]:
        """What the generator is asked to tell of tokens. Raises Refused."""
        if self.logprobs is True:
            raise Refused(400, "logprobs is a number of tokens here: 0 to 20", param="logprobs")
        if self.best_of not in (None, self.n or 1):
            raise Refused(
                400,
                "best_of other than n is not built here; leave it out",
                param="best_of",
                code="unsupported_parameter",
            )
        if self.max_tokens == 0 and not self.echo:
            raise Refused(400, "max_tokens is 0: nothing would be answered; send echo: true, or 1 or more",
                          param="max_tokens")  # fmt: skip
        asked = {"return_log_probs": True, "top_log_probs": self.logprobs} if self.told else {}
        if self.echo and (self.told or self.max_tokens == 0):
            asked["return_prompt_log_probs"] = True
        if self.echo and self.told and self.max_tokens != 0:
            # lm-evaluation-harness leaves the last token out of its sum, for the one that was made. An end of the text
            # has no place in the lists: without another token it would leave out one of the prompt's.
            asked["min_length"] = self.min_tokens or 1
        return asked

    @property
    def told(self) -> bool:
        """Whether log-probabilities are. (0 of the likeliest tokens still tells each token's own.)"""
        return self.logprobs is not None and self.logprobs is not False

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
