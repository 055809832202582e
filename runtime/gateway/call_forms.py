"""How a checkpoint writes calls of tools: read from what its own chat template makes of one.

Known are calls between `<tool_call>` and `</tool_call>` (Hermes, Qwen), a list of calls behind `[TOOL_CALLS]`
(Mistral), and a call that is the whole answer (Llama 3), each as JSON with the function's name and its arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from runtime.gateway.refused import Refused

_MOST = 16  # calls of one answer
_LISTED = "[TOOL_CALLS]"
_BEGINS, _ENDS = re.compile(r"<tool_call>\s*\Z"), re.compile(r"\s*</tool_call>")
_LIST_BEGINS = re.compile(r"\[TOOL_CALLS\]\s*(?=\[\s*\Z)")
_NAME, _ARGUMENTS = "trireme_probe", {"trireme_key": "trireme_value"}
_PROBE: dict[str, Any] = {
    "id": "tr1r3m3pr",  # nine letters and digits, which Mistral's templates ask for
    "type": "function",
    "function": {"name": _NAME, "arguments": _ARGUMENTS},
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"trireme_key": {"type": "string", "description": "Any."}}},
    },
}
_ASKED: dict[str, Any] = {"role": "user", "content": "Hello."}
Render = Callable[..., str]


@dataclass(frozen=True)
class CallForm:
    """`begin` and `end` stand around a call, or around a list of calls; `key` is the name of the arguments. Without a
    `begin` the whole answer is a call, or none of it."""

    begin: str = ""
    end: str = ""
    key: str = "arguments"
    listed: bool = False

    @property
    def mark(self) -> str:
        return self.begin.rstrip()

    def guide(self, calls: dict[str, Any], *, several: bool, must: bool) -> str:
        """For the generator: calls of this schema, behind a text or instead of it unless they `must` come."""
        most = _MOST if several else 1
        if self.listed:
            calls = {"type": "array", "items": calls, "minItems": 1, "maxItems": most}
        once = self.listed or not self.begin
        guide = {"begin": self.begin, "end": self.end, "schema": calls, "most": 1 if once else most, "must": must}
        return json.dumps(guide, ensure_ascii=False)


def form_of(render: Render) -> CallForm | None:
    """`render` is the template's. None for a form that is not known."""
    try:
        called = {"role": "assistant", "content": "", "tool_calls": [_PROBE]}
        text = render([_ASKED, called], [_TOOL], answering=False)
        asked = render([_ASKED], [_TOOL])
    except Refused:
        return None
    found = None
    for at, end, key in _calls(text):  # the last: a template may show an example before
        found = _form(text[:at], text[end:], key, asked)
    return found


def _form(before: str, after: str, key: str, asked: str) -> CallForm | None:
    begins, ends = _BEGINS.search(before), _ENDS.match(after)
    if begins and ends:
        return CallForm(begins[0], ends[0], key)
    listed = _LIST_BEGINS.search(before)
    if listed:
        return CallForm(listed[0], "", key, listed=True)
    return CallForm(key=key) if before.rstrip() == asked.rstrip() else None


def _calls(text: str) -> Iterator[tuple[int, int, str]]:
    """Where the probe is called: begin, end, and what its arguments are named."""
    read = json.JSONDecoder().raw_decode
    for match in re.finditer(r"\{", text):
        try:
            value, end = read(text, match.start())
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("name") == _NAME:
            keys = [key for key in ("arguments", "parameters") if value.get(key) == _ARGUMENTS]
            yield from ((match.start(), end, key) for key in keys)
