"""Calls of tools: the schema that an answer keeps to, and the call that its text is.

The answer is `{"name": "...", "arguments": {...}}` with the blanks of `json.dumps`, which is how the generator writes
JSON of a schema. So where the name ends and the arguments begin is known to the character.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from runtime.gateway.chat_requests import Tool, written

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME, _ARGUMENTS = '{"name": "', '", "arguments": '


def call_schema(tools: Sequence[Tool]) -> str:
    """Of one call of one of these, as JSON. Raises Refused for one that is too large."""
    calls = []
    for place, tool in enumerate(tools):
        given = tool.function.parameters or _NO_ARGUMENTS
        arguments = _moved(given, f"#/anyOf/{place}/properties/arguments")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return written({"anyOf": calls}, "tools")


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


class CallText:
    """A call as it is written, piece by piece. Its last brace is the frame's, so a character is held back."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._text = ""

    def add(self, text: str) -> str:
        """What of the arguments has come, beyond what was given back before."""
        self._text += text
        if self.name is None:
            head, found, rest = self._text.partition(_ARGUMENTS)
            if not found:
                return ""
            self.name, self._text = json.loads(f'"{head.removeprefix(_NAME)}"'), rest
        given, self._text = self._text[:-1], self._text[-1:]
        return given

    def end(self, finish: str) -> str:
        """What was held back: of a call that is whole, the frame's brace, which is no argument."""
        return "" if finish == "stop" or self.name is None else self._text
