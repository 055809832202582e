"""What one token of a vocabulary is written as, and what is told of tokens beside their text: JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime.generation.request import ScoredToken, Top, Update

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names the tokens of byte fallback


class Spelling(NamedTuple):
    """`special`: it is no part of a text; its bytes are those of its name."""

    data: bytes
    special: bool


class TokenTexts:
    """Of a tokenizer, as tokens stand inside a text: with the space that a first word would lose. A token may be a part
    of a character, so it is bytes."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self._known: dict[int, Spelling] = {}
        self._added = fast.get_added_tokens_decoder()
        decoder = "" if fast.decoder is None else bytes(fast.decoder.__getstate__()).decode()
        self._bytes = _byte_of_characters() if '"ByteLevel"' in decoder else {}
        self._fallback = '"ByteFallback"' in decoder
        self._anchor: tuple[int, str] | None = None

    def spelling(self, token: int) -> Spelling:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> Spelling:
        added = self._added.get(token)
        if added is not None:
            return Spelling(added.content.encode(), added.special)
        name = self._fast.id_to_token(token)
        if name is None:  # models have more logits than tokens
            return Spelling(b"", True)
        if self._bytes and all(character in self._bytes for character in name):
            return Spelling(bytes(self._bytes[character] for character in name), False)
        match = _BYTE.fullmatch(name) if self._fallback else None
        if match is not None:
            return Spelling(bytes.fromhex(match[1]), False)
        anchor, before = self._shown()
        text = self._fast.decode([anchor, token], skip_special_tokens=False)
        return Spelling((text[len(before) :] if text.startswith(before) else name).encode(), False)

    def _shown(self) -> tuple[int, str]:
        """A token that shows, and its text: what stands behind it keeps its space."""
        if self._anchor is None:
            shown = ((token, self._fast.decode([token])) for token in range(self._fast.get_vocab_size()))
            self._anchor = next(((token, text) for token, text in shown if text.strip().isalnum()), (0, ""))
        return self._anchor

    def output_details(self, update: Update) -> str:
        """Of the tokens that an update brings."""
        tops: Sequence[Top] = update.tops or ((),) * len(update.tokens)
        return self.details(map(ScoredToken, update.tokens, update.logprobs, tops))

    def details(self, scored: Any) -> str:
        """A JSON list: of each token `id`, `bytes` in hexadecimal digits, `special` where it is, `logprob`, and `top`
        with the first three of the likeliest tokens. A prompt's first token has no log-probability: null."""
        told = [
            {**self._told(item.token, item.logprob), "top": [self._told(token, value) for token, value in item.top]}
            for item in scored
        ]
        return json.dumps(told, separators=(",", ":"))

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        data, special = self.spelling(token)
        told: dict[str, Any] = {"id": token, "bytes": data.hex(), "logprob": logprob}
        return {**told, "special": True} if special else told


def _byte_of_characters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: those that print as themselves, the others from U+0100 on (GPT-2's)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
