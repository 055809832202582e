"""The chat template of a checkpoint, where it has one: a file of its own, or a key of tokenizer_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.checkpoint.reading import read_optional
from builders.errors import CheckpointError
from runtime.settings import ChatSettings

_LARGEST = 256 << 10
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def chat_settings(folder: Path) -> ChatSettings | None:
    """As transformers chooses: chat_template.jinja goes before the key; of several, `default`.

    Raises CheckpointError for a template that Jinja does not read.
    """
    config = read_optional(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.is_file() else _of_config(config)
    if found is None:
        return None
    _require_template(folder, found)
    named = {**read_optional(folder / "special_tokens_map.json"), **config}
    texts = {name: _text(named.get(name)) for name in _TOKENS}
    return ChatSettings(template=found, special_tokens={name: text for name, text in texts.items() if text is not None})


def _of_config(config: dict[str, Any]) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):
        by_name = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = by_name.get("default")
    return found if isinstance(found, str) else None


def _text(token: Any) -> str | None:
    """A token may be written with its properties."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _require_template(folder: Path, template: str) -> None:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(template)
        wrong = f"{len(template)} characters" if len(template) > _LARGEST else None
    except TemplateError as error:
        wrong = str(error)
    if wrong is not None:
        raise CheckpointError(
            f"chat template of {folder} (chat_template.jinja, tokenizer_config.json)", got=wrong,
            expected=f"a Jinja template of at most {_LARGEST} characters",
            fix="copy the file again, or remove the template where the model is not to chat",
        )  # fmt: skip
