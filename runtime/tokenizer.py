"""Text to token ids, with the `tokenizers` library and no framework around it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment, BadRequest
from runtime.settings import TokenizerSettings


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text (or pair), without padding."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool


class Tokenizer:
    """A `tokenizer.json`, with truncation and padding set by us and not by what the file happens to hold."""

    def __init__(self, file: Path, settings: TokenizerSettings) -> None:
        # A thread pool of its own would fight the executor for the cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for an unreadable file
            raise BadEnvironment(f"{file.name} is not a tokenizer file: {error}") from error
        self._fast.no_padding()
        self._fast.enable_truncation(settings.max_length)
        self.settings = settings

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoded]:
        """One result a text. `pairs[i]` follows `texts[i]` as the second segment."""
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        return [
            Encoded(ids=item.ids, type_ids=item.type_ids, truncated=bool(item.overflowing))
            for item in self._fast.encode_batch(inputs)
        ]

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
