"""Text to token ids, with the `tokenizers` library and no framework around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadRequest
from runtime.prefix import Prefix
from runtime.settings import TokenizerSettings
from runtime.token_rows import holds_ids, unpack_ids
from runtime.tokenizer_file import open_tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text (or pair), without padding."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool


class Tokenizer:
    """A `tokenizer.json`, with truncation and padding set by us and not by what the file happens to hold."""

    def __init__(self, file: Path, settings: TokenizerSettings) -> None:
        """Raises BadEnvironment."""
        self._fast = open_tokenizer(file, settings.lower_case)
        self._fast.enable_truncation(settings.max_length)
        self._prefix = Prefix(self._fast, settings.max_length)
        self.settings = settings
        self._before, self._behind = _frame(self._fast)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, prompts: Sequence[str] | None = None
    ) -> list[Encoded]:
        """One result a text. `pairs[i]` follows `texts[i]` as the second segment; `prompts[i]`, by default the model's
        own prompt, stands before it. The library reads no more of a text than its tokens can need (of a pair, each by
        itself)."""
        before = prompts if prompts is not None else [self.prompt(None)] * len(texts)
        texts = [f"{prompt}{text}" for prompt, text in zip(before, texts, strict=True)]
        columns = [[self._prefix.cut(text) for text in column] for column in (texts, pairs) if column is not None]
        rows = list(zip(*columns, strict=True))
        inputs = [tuple(text for text, _ in row) if pairs is not None else row[0][0] for row in rows]
        return [
            Encoded(item.ids, item.type_ids, truncated=bool(item.overflowing) or any(went_on for _, went_on in row))
            for item, row in zip(self._fast.encode_batch(inputs), rows, strict=True)
        ]

    def encode_rows(self, rows: Sequence[tuple[str | Encoded, ...]], prompts: Sequence[str]) -> list[Encoded]:
        """Rows of texts, and rows that came as token ids, which are as they came."""
        found: list[Any] = [row[0] for row in rows]
        places = [place for place, first in enumerate(found) if not isinstance(first, Encoded)]
        if places:
            texts, *pairs = zip(*(rows[place] for place in places), strict=True)
            made = self.encode(texts, pairs[0] if pairs else None, [prompts[place] for place in places])
            for place, one in zip(places, made, strict=True):
                found[place] = one
        return found

    def read(self, raw: Sequence[bytes], name: str) -> list[str | Encoded]:
        """An input of one request. Raises BadRequest that names the item at fault."""
        if not any(holds_ids(item) for item in raw):
            return list(decode_texts(raw, name))
        found: list[str | Encoded] = []
        for index, item in enumerate(raw):
            try:
                ids = unpack_ids(item)
            except ValueError as error:
                raise BadRequest(f"{name}[{index}]: {error}") from error
            if ids is None:
                raise BadRequest(f"{name} mixes texts and token ids")
            found.append(self._given(ids, f"{name}[{index}]"))
        return found

    def _given(self, ids: list[int], what: str) -> Encoded:
        """Ids as somebody else made them. Those of another model's tokenizer would be read without a sign of it; but
        they lack the special tokens around them, which therefore must be there. Raises BadRequest."""
        before, behind, most = self._before, self._behind, self.settings.max_length
        if self.settings.pair:
            raise BadRequest(f"{what} holds token ids; this model reads pairs of texts")
        if len(ids) > most:
            raise BadRequest(f"{what} has {len(ids)} tokens; this model takes at most {most}")
        unknown = next((one for one in set(ids) if one < 0 or self._fast.id_to_token(one) is None), None)
        if unknown is not None:
            raise BadRequest(f"{what} holds {unknown}, which is no token of this model")
        framed = ids[: len(before)] == before and ids[len(ids) - len(behind) :] == behind
        if not framed or len(ids) <= len(before) + len(behind):
            said = f"begin with {before} and end with {behind}" if before or behind else "are at least one"
            raise BadRequest(f"{what}: token ids of this model's own tokenizer {said}; these do not")
        return Encoded(ids, [0] * len(ids), truncated=False)

    def prompt(self, name: str | None) -> str:
        """What stands before each text of a request that names this prompt; None: it names none. Raises BadRequest."""
        chosen = self.settings.prompt_name if name is None else name
        if chosen is None:
            return ""
        if chosen not in self.settings.prompts:
            known = ", ".join(sorted(self.settings.prompts)) or "no prompts"
            raise BadRequest(f"prompt_name is {chosen!r}; this model has {known}")
        return self.settings.prompts[chosen]

    def pad(self, encoded: Sequence[Encoded]) -> dict[str, NDArray[np.int64]]:
        """Graph inputs of shape [texts, length]; the length is the longest text's, or the next bucket."""
        length = max(len(item.ids) for item in encoded)
        length = next((bucket for bucket in self.settings.length_buckets if bucket >= length), length)
        shape = (len(encoded), length)
        feeds = {
            "input_ids": np.full(shape, self.settings.pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
        }
        if self.settings.token_type_ids:
            feeds["token_type_ids"] = np.zeros(shape, np.int64)
        for row, item in enumerate(encoded):
            count = len(item.ids)
            feeds["input_ids"][row, :count] = item.ids
            feeds["attention_mask"][row, :count] = 1
            if self.settings.token_type_ids:
                feeds["token_type_ids"][row, :count] = item.type_ids
        return feeds


def _frame(fast: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    made = fast.encode("a")
    marks = made.special_tokens_mask
    first = next((place for place, mark in enumerate(marks) if not mark), len(marks))
    last = next((place for place in range(len(marks), first, -1) if not marks[place - 1]), first)
    return made.ids[:first], made.ids[last:]


def read_prompt_name(parameters: str) -> str | None:
    """Of a request's own parameters, which Triton hands over as JSON. Raises BadRequest."""
    name = json.loads(parameters or "{}").get("prompt_name")
    if name is not None and not isinstance(name, str):
        raise BadRequest(f"prompt_name is {name!r}; send the name of a prompt")
    return name


def decode_texts(raw: Sequence[bytes], name: str) -> list[str]:
    """UTF-8 bytes of one request to text. Raises BadRequest that names the item at fault."""
    texts = []
    for index, item in enumerate(raw):
        try:
            text = item.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(
                f"{name}[{index}]: byte {error.start} is not valid UTF-8; send text encoded as UTF-8"
            ) from error
        if not text.strip():
            raise BadRequest(f"{name}[{index}] is empty; send at least one character that is not white space")
        texts.append(text)
    return texts
