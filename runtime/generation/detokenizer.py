"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from runtime.generation.stops import StopSearch

_REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
_KEPT = 4  # tokens of the window that stay: an unfinished character has at most three bytes, a token at least one
_WINDOW = 8  # tokens in it at most
_SCANNED = 256  # of the prompt's end, for tokens that show
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names the tokens of byte fallback


class Decoder(Protocol):
    """As `tokenizers` has it. Its `id_to_token` names the tokens of byte fallback; one without it has none."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Text of one sequence, piece by piece: the pieces joined are what the output adds to the decoded prompt, up to a
    stop string. Bytes that are no character show as in Python's `errors="replace"`.

    Decoders look at neighbours: the first token that shows loses its space, a character may be cut into tokens. So a
    window is decoded that begins a few tokens earlier, and what it shows beyond the last time is new. Tokens that add
    nothing leave the window, so its cost does not grow. Tokens of byte fallback go through UTF-8 one by one, because
    their decoder unsays good characters when bad bytes follow.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`prompt`: what the output continues, where it continues anything; an encoder-decoder's does not. `shown`:
        texts of tokens that the decoder would leave out."""
        self._decoder, self._shown = decoder, shown
        self._name = getattr(decoder, "id_to_token", lambda token: None)
        self._stops = StopSearch(stop) if stop else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = self._last_shown(prompt)  # the window
        self._text = decoder.decode(self._ids)  # of the window
        self._sent = len(self._text)  # characters of it that are out
        # Replacement characters that show for a part of a character at the prompt's end: they count as shown.
        self._open = int(self._text.endswith(_REPLACEMENT))
        for token in self._ids:
            byte = self._byte(token)
            self._utf8.decode(byte or b"", final=byte is None)
        if self._unfinished:
            self._open = len(self._unfinished.decode(errors="replace"))

    @property
    def held_tokens(self) -> int:
        """How many of the last tokens belong to text that is held back; after a stop string, to what it cut off."""
        return self._stops.held_tokens if self._stops else 0

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was completed; nothing behind it is ever shown."""
        if self._stops is None:
            return self._decode(token), False
        self._stops.begin_token()
        name = self._special(token)
        return self._stops.add("" if name else self._decode(token), name, may_stop=may_stop)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._end_bytes() + self._rest()
        if self._stops is None:
            return rest
        text, stopped = self._stops.add(rest)
        return text if stopped else text + self._stops.end()

    def _decode(self, token: int) -> str:
        if token in self._shown:
            rest = self._end_bytes() + self._rest()
            self._anchor([])
            return rest + self._new(self._shown[token])
        byte = self._byte(token)
        if byte is None:
            if self._unfinished and self._special(token):
                return ""
            return self._end_bytes() + self._add(token)
        if not self._text and byte.isascii() and not self._unfinished:
            return self._add(token)  # the decoder knows what becomes of a space in front
        if not self._unfinished:
            self._open = 0  # what the prompt ends in is whole, or was bytes of no character
        rest = self._rest()
        self._anchor([token])
        return rest + self._new(self._utf8.decode(byte))

    def _add(self, token: int) -> str:
        text = self._decoder.decode([*self._ids, token])
        ends = not text.endswith(_REPLACEMENT)
        if text == self._text and ((ends and text) or self._special(token)):
            return ""  # without text, and not part of a character
        self._ids.append(token)
        self._text = text
        begin, end = self._sent - self._open, len(text) - (not ends)
        new = ""
        if end > begin:
            new = self._new(text[begin:end])
            self._sent = end
        if len(self._ids) > _WINDOW:
            self._anchor(self._ids[-_KEPT:])
            if self._text.endswith(_REPLACEMENT) and not self._open:
                self._sent -= 1
        return new

    def _new(self, text: str) -> str:
        """Without what the prompt has shown of a character that began there and never became one."""
        if text and self._open:
            shown, self._open = _REPLACEMENT * self._open, 0
            return text.removeprefix(shown)
        return text

    def _rest(self) -> str:
        """What the window holds back."""
        rest, self._sent = self._text[self._sent :], max(self._sent, len(self._text))
        return rest

    @property
    def _unfinished(self) -> bytes:
        """They wait for the rest of their character."""
        return self._utf8.getstate()[0]

    def _end_bytes(self) -> str:
        return self._new(self._utf8.decode(b"", final=True))

    def _anchor(self, ids: list[int]) -> None:
        self._ids, self._text = ids, self._decoder.decode(ids)
        self._sent = len(self._text)

    def _byte(self, token: int) -> bytes | None:
        """The byte that a token of byte fallback stands for, where the decoder reads it as one."""
        match = _BYTE.fullmatch(self._name(token) or "")
        if match is None or self._decoder.decode([token]) == match[0]:
            return None
        return bytes.fromhex(match[1])

    def _special(self, token: int) -> str:
        """The text of a token that is not part of the text; empty for any other."""
        if self._decoder.decode([token]):
            return ""
        return self._decoder.decode([token], skip_special_tokens=False)

    def _last_shown(self, prompt: Sequence[int]) -> list[int]:
        """The last few tokens of the prompt that are not special."""
        found: list[int] = []
        for token in reversed(prompt[-_SCANNED:]):
            if len(found) < _KEPT and not self._special(int(token)):
                found.append(int(token))
        return found[::-1]
