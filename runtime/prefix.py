"""How much of a long text its first tokens need, so that the tokenizer never sees the rest."""

from __future__ import annotations

import re
from typing import Any

_LIKELY = 8  # characters a token, more than in most texts
_GROWTH = 4
_MARGIN = 32  # tokens: a cut changes none that is so far before it
_READ = 1 << 20  # characters of a text that are looked at
_BLANKS = re.compile(r"[ \t\n\r]{2,}")
_ONE_GAP = ("one \t\n\r  two", "one\t\ttwo", "one\n\ntwo", "one\r\rtwo", "one  two")


class Prefix:
    """Cuts texts for one tokenizer (of `tokenizers`) and one number of tokens.

    A text is cut behind its first `tokens` tokens, or at `most` characters: so many as that many of the longest tokens
    have. Where the tokenizer takes any run of white space for one space, so does the count. What remains are texts
    of which a token stands for more characters than it has: endless unknown words, characters that are dropped.
    """

    def __init__(self, fast: Any, tokens: int) -> None:
        self._fast, self._tokens = fast, tokens
        longest = max((len(token) for token in fast.get_vocab(with_added_tokens=True)), default=1)
        self._first = _LIKELY * tokens + 256
        self.most = max(tokens * longest, self._first)
        self._one_gap = all(self._ids(text) == self._ids("one two") for text in _ONE_GAP)

    def cut(self, text: str) -> tuple[str, bool]:
        """The text, or a beginning of it whose first tokens are the text's own; and whether the text went on."""
        if len(text) <= self._first:
            return text, False
        read = text[:_READ] if self._one_gap else text[: self.most]
        short = _BLANKS.sub(" ", read) if self._one_gap else read
        size = self._first
        while size < min(len(short), self.most):
            if len(self._ids(short[:size])) >= self._tokens + _MARGIN:
                return short[:size], True
            size *= _GROWTH
        return short[: self.most], len(read) < len(text) or len(short) > self.most

    def _ids(self, text: str) -> list[int]:
        # `encode` would keep Python's lock for as long as it runs; `encode_batch` gives it up.
        encoding = self._fast.encode_batch([text], add_special_tokens=False)[0]
        ids: list[int] = encoding.ids + [token for more in encoding.overflowing for token in more.ids]
        return ids
