"""Where a text that comes piece by piece has to end: the search for stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopSearch:
    """Holds back what may be the beginning of a stop string; nothing behind one is ever shown.

    A stop string may name special tokens, each as a whole: their text is searched and never shown. Of stop strings that
    overlap, the one that is complete first counts, so the text does not depend on where tokens cut it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""  # text that may be the beginning of a stop string
        self._tail = ""  # the same with the text of special tokens in it
        self._shows = (
            ""  # for each of its characters: "1" where it shows, "[" and "0" for a special token's first and rest
        )
        self._received = 0  # characters of text that have come
        self._starts: deque[int] = deque()  # `_received` when each token came whose text is held

    @property
    def held_tokens(self) -> int:
        """How many of the last tokens belong to text that is held back; after a stop string, to what it cut off."""
        return len(self._starts)

    def begin_token(self) -> None:
        self._starts.append(self._received)

    def add(self, new: str, special: str = "", *, may_stop: bool = True) -> tuple[str, bool]:
        """Takes text that shows, or `special` text that does not. What can be shown now, and whether to stop."""
        before = len(self._held), len(self._tail)
        self._held += new
        self._tail += new or special
        self._shows += "1" * len(new) or ("[" + "0" * (len(special) - 1) if special else "")
        self._received += len(new)
        found = self._complete(*before) if may_stop else None
        if found is not None:
            shown, self._held = self._held[:found], self._held[found:]
            self._let_go()
            self._held = self._tail = self._shows = ""
            return shown, True
        tail = max((_overlap(self._tail, stop) for stop in self._stop), default=0)
        self._tail, self._shows = self._tail[len(self._tail) - tail :], self._shows[len(self._shows) - tail :]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        keep = max(keep, self._shows.count("1"))
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._let_go()
        if not self._tail:
            self._starts.clear()
        return shown, False

    def end(self) -> str:
        """No more comes: what was held."""
        held, self._held, self._tail, self._shows = self._held, "", "", ""
        self._starts.clear()
        return held

    def _complete(self, held: int, tail: int) -> int | None:
        """Where in `_held` the stop string begins that is complete first. In the first `held` and `tail` characters
        there is none that counts: they were searched when they came."""
        ends: list[tuple[int, int]] = []  # how much shows after it, and its beginning
        for stop in self._stop:
            at = self._held.find(stop, max(0, held - len(stop) + 1))
            if at >= 0:
                ends.append((len(self._held) - at - len(stop), at))
            at = self._whole(stop, max(0, tail - len(stop) + 1))
            if at >= 0:
                ends.append((self._shows.count("1", at + len(stop)), len(self._held) - self._shows.count("1", at)))
        return max(ends, key=lambda item: (item[0], -item[1]))[1] if ends else None

    def _whole(self, stop: str, start: int) -> int:
        """Where in `_tail` the stop string stands without a part of a special token's text, or -1."""
        at = self._tail.find(stop, start)
        while at >= 0 and "0" in (self._shows[at], self._shows[at + len(stop) : at + len(stop) + 1]):
            at = self._tail.find(stop, at + 1)
        return at

    def _let_go(self) -> None:
        """Tokens that began before the held text are out."""
        while self._starts and self._starts[0] < self._received - len(self._held):
            self._starts.popleft()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
