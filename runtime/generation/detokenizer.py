"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no character, or not yet
_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, and a token at least one


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Text of one sequence, piece by piece. The pieces joined are the decoded whole, up to a stop string.

    Decoders look at neighbours (a leading space, bytes of one character), so a window is decoded that begins one piece
    earlier than the text that is still to come; its cost does not grow with the output.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = decoder, tuple(stop)
        self._ids: list[int] = []  # the window
        self._settled = 0  # of the window: tokens whose text is out
        self._sent = 0  # of the window's text: characters that are out
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was completed; nothing behind it is ever shown."""
        return self._release(self._decode(token), may_stop)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._held + self._decoder.decode(self._ids)[self._sent :]
        self._held, self._ids, self._sent, self._settled = "", [], 0, 0
        return text

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        text = self._decoder.decode(self._ids)
        if text.endswith(_REPLACEMENT):
            if len(self._ids) - self._settled <= _CHARACTER_TOKENS:
                return ""
            # Too many tokens for one character: these bytes are none. The last of them may begin one.
            new = text[self._sent : -1]
            self._sent = max(self._sent, len(text) - 1)
            return new
        new = text[self._sent :]
        if new:
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
            self._sent = len(self._decoder.decode(self._ids))
        return new

    def _release(self, new: str, may_stop: bool) -> tuple[str, bool]:
        if not self._stop:
            return new, False
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0] if may_stop else []
        if found:
            self._held, self._ids = "", []
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
