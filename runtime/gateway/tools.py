"""Calls of tools: the schema that an answer keeps to, and the calls that its text is.

A call is `{"name": "...", "arguments": {...}}` with the blanks of `json.dumps`, which is how the generator writes JSON
of a schema. So where the name ends and the arguments begin is known to the character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from runtime.gateway.call_forms import CallForm
from runtime.gateway.chat_requests import Tool, written

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def call_schema(tools: Sequence[Tool], form: CallForm) -> dict[str, Any]:
    """Of one call of one of these. Raises Refused for one that is too large."""
    calls, key, place = [], form.key, "#/items" if form.listed else "#"
    for number, tool in enumerate(tools):
        given = tool.function.parameters or _NO_ARGUMENTS
        arguments = _moved(given, f"{place}/anyOf/{number}/properties/{key}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, key: arguments},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    schema = {"anyOf": calls}
    written(schema, "tools")
    return schema


def _moved(schema: Any, root: str) -> Any:
    """With the references of a schema that no longer is the whole."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:]
        if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for name, value in schema.items()
    }


class AnswerPart(NamedTuple):
    """What a piece of an answer brings: text for the reader, the name of a call that begins, or some of its arguments;
    `ended` is a call that is whole."""

    kind: Literal["text", "call", "arguments", "ended"]
    text: str = ""


class CallText:
    """An answer's text as it is written, piece by piece. `must`: it is a call; else a text may stand before calls."""

    def __init__(self, form: CallForm, *, must: bool) -> None:
        self._form = form
        self._held = ""  # not told yet: it may be a part of a mark, or of what stands around a call
        self._state: Literal["undecided", "text", "mark", "head", "arguments"] = "head" if must else "undecided"
        self._depth, self._quoted, self._escaped = 0, False, False

    def add(self, text: str) -> list[AnswerPart]:
        self._held += text
        found: list[AnswerPart] = []
        while self._step(found):
            pass
        return found

    def end(self) -> list[AnswerPart]:
        """What was held back of a text."""
        rest, self._held = self._held, ""
        return [AnswerPart("text", rest)] if rest and self._state in ("undecided", "text", "mark") else []

    def _step(self, found: list[AnswerPart]) -> bool:
        """Whether the state has changed, so that what is held has to be looked at again."""
        if self._state == "undecided":
            return self._decide()
        if self._state in ("text", "mark"):
            return self._read_text(found)
        return self._read_head(found) if self._state == "head" else self._read_arguments(found)

    def _decide(self) -> bool:
        """Blanks before a call are no text of the answer."""
        first = self._held.lstrip()
        if not first:
            return False
        if not self._form.mark:
            self._state = "head" if first.startswith("{") else "text"
        elif first.startswith(self._form.mark):
            self._state, self._held = "mark", first
        elif self._form.mark.startswith(first):
            return False
        else:
            self._state = "mark"
        return True

    def _read_text(self, found: list[AnswerPart]) -> bool:
        """`text`: no call comes any more; `mark`: one may."""
        mark = self._form.mark
        if self._state == "text":
            text, self._held = self._held, ""
        else:
            text, marked, rest = self._held.partition(mark)
            if marked:
                self._state, self._held = "head", rest
            else:
                kept = next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
                text, self._held = (text[:-kept], text[-kept:]) if kept else (text, "")
        if text:
            found.append(AnswerPart("text", text))
        return self._state == "head"

    def _read_head(self, found: list[AnswerPart]) -> bool:
        head, begun, rest = self._held.partition(f'", "{self._form.key}": ')
        if not begun:
            return False
        found.append(AnswerPart("call", head.rpartition('{"name": "')[2]))
        self._state, self._held = "arguments", rest
        self._depth, self._quoted, self._escaped = 0, False, False
        return True

    def _read_arguments(self, found: list[AnswerPart]) -> bool:
        """Until the brace that closes the call itself, and is no argument."""
        for place, character in enumerate(self._held):
            if self._closes(character):
                self._tell_arguments(self._held[:place], found)
                found.append(AnswerPart("ended"))
                self._state, self._held = "head", self._held[place + 1 :]
                return True
        self._tell_arguments(self._held, found)
        self._held = ""
        return False

    def _tell_arguments(self, text: str, found: list[AnswerPart]) -> None:
        if text:
            found.append(AnswerPart("arguments", text))

    def _closes(self, character: str) -> bool:
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth < 0
