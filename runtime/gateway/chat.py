"""A chat as the text that the model was trained on: the checkpoint's own template, sandboxed, bounded in what it makes.

A template never comes from a request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.errors import BadEnvironment
from runtime.gateway.call_forms import CallForm, form_of
from runtime.gateway.refused import Refused
from runtime.settings import ChatSettings, GeneratorModelSettings

_KEPT = 4  # versions
_SECONDS = 2.0  # looked at between pieces; a template of a page takes some milliseconds


class ChatTemplate:
    """Compiled once. Raises BadEnvironment for a template that is none."""

    def __init__(self, settings: ChatSettings, characters: int) -> None:
        from jinja2 import TemplateError, meta
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(settings.template)
            self._shows_tools = "tools" in meta.find_undeclared_variables(environment.parse(settings.template))
        except TemplateError as error:
            raise BadEnvironment(f"the chat template cannot be read: {error}") from error
        self._tokens, self._characters = settings.special_tokens, characters
        self._form = form_of(self.render) if self._shows_tools else None

    def call_form(self, *, chosen: bool) -> CallForm:
        """How the model calls tools. Where that is not known, calls that must come are JSON alone; Raises Refused for
        those that the model is to have `chosen`."""
        if chosen and self._shows_tools and self._form is None:
            raise Refused(
                400, "tool_choice auto: the model's chat template writes calls in a form that is not read here; send "
                "required, one function's name, or none", param="tool_choice", code="unsupported_parameter",
            )  # fmt: skip
        return self._form or CallForm()  # `render` refuses tools that it does not show

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None, answering: bool = True
    ) -> str:
        """`answering`: with the beginning of the answer. Raises Refused for chats that the template does not take."""
        if tools and not self._shows_tools:
            raise Refused(400, "the model's chat template does not show tools", param="tools")
        pieces, size, end = [], 0, time.monotonic() + _SECONDS
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=answering, tools=tools, documents=None, **self._tokens
            ):
                size += len(piece)
                if size > self._characters or time.monotonic() > end:
                    raise Refused(400, f"the chat makes more text than the {self._characters} characters that fit")
                pieces.append(piece)
        except Refused:
            raise
        except Exception as error:  # whatever the checkpoint's code makes of these messages
            raise Refused(400, "the model's chat template does not take these messages", param="messages") from error
        return "".join(pieces)


class ChatTemplates:
    """Of the versions of one model. `place`: the repository that holds a version; None: there is none."""

    def __init__(self, place: Callable[[int], Path | None], model: str, characters: int) -> None:
        self._place, self._model, self._characters = place, model, characters
        self._known: dict[int, ChatTemplate | None] = {}

    def of(self, version: int) -> ChatTemplate:
        """Raises Refused for a model without one."""
        if version not in self._known:
            self._known[version] = self._load(version)
            if len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
        found = self._known[version]
        if found is None:
            raise Refused(400, f"{self._model} has no chat template; use /v1/completions", code="no_chat_template")
        return found

    def _load(self, version: int) -> ChatTemplate | None:
        repository = self._place(version)
        if repository is None:
            return None
        chat = GeneratorModelSettings.load(repository / self._model / str(version)).chat
        return None if chat is None else ChatTemplate(chat, self._characters)


def _tojson(value: Any, indent: int | None = None) -> str:
    """As transformers has it: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise Refused(400, f"the chat template refuses: {str(message)[:200]}", param="messages")


def _now(form: str) -> str:
    return datetime.now(UTC).strftime(form)
