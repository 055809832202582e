"""The choices of an answer in OpenAI's shapes, as their pieces come: texts, log-probabilities, calls of tools."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from runtime.gateway.call_forms import CallForm
from runtime.gateway.tools import CallText

Fields = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How a completion differs from a chat. `told`: log-probabilities are wanted; `calls`: the form in which the answer
    may call tools, or must."""

    chat: bool
    id: str
    model: str
    created: int
    told: bool = False
    calls: CallForm | None = None
    must: bool = False

    def envelope(self, choices: list[Fields], stream: bool, **more: Any) -> Fields:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more,
        }  # fmt: skip


@dataclass
class AskedPrompt:
    """`text` None: it came as token ids. `details` come with the first choice, before any choice has text."""

    text: str | None = None
    echo: bool = False
    details: list[Fields] = field(default_factory=list)

    @property
    def shown(self) -> str:
        if self.text is not None:
            return self.text
        data = b"".join(bytes.fromhex(item["bytes"]) for item in self.details if not item.get("special"))
        return data.decode(errors="replace")


class AnswerChoice:
    """`last` is the piece with the finish reason, when it has come."""

    def __init__(self, shape: Shape, prompt: AskedPrompt, index: int) -> None:
        self._shape, self._prompt, self.index = shape, prompt, index
        self._scores = _ChatScores() if shape.chat else CompletionScores()
        self._call = None if shape.calls is None else CallText(shape.calls, must=shape.must)
        self._called = 0  # calls that have begun
        self._began = False
        self._texts: list[str] = []
        self._told: list[Fields] = []
        self.last: Fields = {}

    @property
    def form(self) -> str:
        """The field of a request that holds the answer to a schema."""
        return "response_format" if self._shape.calls is None else "tools"

    @property
    def source(self) -> str:
        """The field of a request that the text to go on from comes in."""
        return "messages" if self._shape.chat else "prompt"

    def whole(self) -> Fields:
        """Of what `add` has taken."""
        text, finish = "".join(self._texts), self.last["finish_reason"]
        told = {"index": self.index, "logprobs": self._scores.joined(self._told) if self._shape.told else None}
        if not self._shape.chat:
            return {**told, "finish_reason": finish, "text": text}
        message: Fields = {"role": "assistant", "content": text, "refusal": None}
        if self._call is not None:
            parts = [*self._call.add(text), *self._call.end()]
            message["content"] = "".join(part.text for part in parts if part.kind == "text")
            calls: list[Fields] = []
            for part in parts:
                if part.kind == "call":
                    calls.append(self._new_call(part.text))
                elif part.kind == "arguments":
                    calls[-1]["function"]["arguments"] += part.text
            if calls:
                message["tool_calls"] = calls
            if (calls or self._shape.must) and not message["content"]:
                message["content"] = None
        return {**told, "finish_reason": self._finish(finish), "message": message}

    def add(self, piece: Fields) -> None:
        text, details = self._take(piece)
        self._texts.append(text)
        if details is not None:
            self._told.append(details)

    def deltas(self, piece: Fields) -> list[Fields]:
        """The events of a stream that a piece is worth."""
        began, self._began = self._began, self._began or self._shape.chat
        text, details = self._take(piece)
        finish = piece.get("finish_reason")
        if not self._shape.chat:
            told = {"index": self.index, "finish_reason": finish, "logprobs": details}
            return [{**told, "text": text}] if text or finish or details else []
        found = [] if began else [{"role": "assistant", "content": None if self._shape.must else ""}]
        if self._call is not None:
            found += self._call_deltas(text, finish)
        elif text or details:
            found.append({"content": text})
        events = [{"index": self.index, "finish_reason": None, "logprobs": None, "delta": delta} for delta in found]
        if details and events:
            events[-1]["logprobs"] = details
        if finish:
            told = {"index": self.index, "finish_reason": self._finish(finish), "logprobs": None}
            events.append({**told, "delta": {}})
        return events

    def _take(self, piece: Fields) -> tuple[str, Fields | None]:
        """The piece's text and log-probabilities; with the first ones of a completion, those of an echo."""
        if "finish_reason" in piece:
            self.last = piece
        prompt, text = self._prompt, piece["text_output"]
        if "prompt_details" in piece:
            prompt.details += orjson.loads(piece["prompt_details"])
        details = orjson.loads(piece["output_details"]) if self._shape.told and "output_details" in piece else []
        if not (text or details or self.last):
            return "", None
        echoes, found = [], prompt.echo and not self._began
        if found:
            self._began = True
            if self._shape.told:
                echoes.append(self._scores.tell(prompt.details, prompt.shown))
            text = prompt.shown + text
        if not self._shape.told or not (details or echoes):
            return text, None
        return text, self._scores.joined([*echoes, self._scores.tell(details)])

    def _call_deltas(self, text: str, finish: str | None) -> list[Fields]:
        call = self._call
        assert call is not None
        found: list[Fields] = []
        for part in (*call.add(text), *(call.end() if finish else ())):
            if part.kind == "text":
                found.append({"content": part.text})
            elif part.kind == "call":
                found.append({"tool_calls": [{"index": self._called, **self._new_call(part.text)}]})
            elif part.kind == "arguments":
                told = {"index": self._called - 1, "function": {"arguments": part.text}}
                found.append({"tool_calls": [told]})
        return found

    def _new_call(self, name: str) -> Fields:
        id_ = f"call_{self._shape.id.rpartition('-')[2]}_{self.index}_{self._called}"
        self._called += 1
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": ""}}

    def _finish(self, finish: str) -> str:
        return "tool_calls" if self._called and finish == "stop" else finish


class CompletionScores:
    """`text_offset` counts characters of the choice's own text; a special token has none of them."""

    def __init__(self) -> None:
        self._offset = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def tell(self, details: Sequence[Fields], text: str | None = None) -> Fields:
        """`text`: what these tokens are a part of, where that is known. It may lack the space of their first word."""
        offsets = []
        for item in details:
            offsets.append(self._offset)
            if not item.get("special"):
                piece = self._utf8.decode(bytes.fromhex(item["bytes"]))
                if text is not None and not text.startswith(piece, self._offset):
                    piece = piece.lstrip(" ") if text.startswith(piece.lstrip(" "), self._offset) else ""
                self._offset += len(piece)
        if text is not None:
            self._offset = len(text)
        return {
            "tokens": [token_text(item) for item in details],
            "token_logprobs": [item["logprob"] for item in details],
            "top_logprobs": [_top(item) for item in details],
            "text_offset": offsets,
        }

    def joined(self, told: Sequence[Fields]) -> Fields:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [value for one in told for value in one[name]] for name in names}


class _ChatScores:
    def tell(self, details: Sequence[Fields], text: str | None = None) -> Fields:
        return {"content": [{**_chat(item), "top_logprobs": list(map(_chat, item["top"]))} for item in details]}

    def joined(self, told: Sequence[Fields]) -> Fields:
        return {"content": [value for one in told for value in one["content"]], "refusal": None}


def _top(item: Fields) -> dict[str, float] | None:
    """With the token's own, as OpenAI has it; of two that read alike the likelier. None for a prompt's first."""
    if item["logprob"] is None:
        return None
    found: dict[str, float] = {}
    for one in (*item["top"], item):
        found.setdefault(token_text(one), one["logprob"])
    return found


def _chat(item: Fields) -> Fields:
    return {
        "token": token_text(item), "logprob": item["logprob"], "bytes": list(bytes.fromhex(item["bytes"])),
    }  # fmt: skip


def token_text(item: Fields) -> str:
    """A part of a character is written as OpenAI writes it."""
    data = bytes.fromhex(item["bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
