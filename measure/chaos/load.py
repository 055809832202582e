"""Steady load through the gateway: users who never pause, and hold each answer against the first to its text."""

from __future__ import annotations

import http.client
import json
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from builders.errors import MachineError
from builders.judging import corpus

ASK_S = 120.0
_TEXTS = 32
_TOKENS = 24  # of a stream
_SAME = 0.98  # of two vectors of one text: batches of other sizes differ a little
_AFTER_FAILURE_S = 0.05
OK, WRONG = "200", "wrong"


@dataclass
class SteadyLoad(ABC):
    """`causes` counts what became of requests: a status, "wrong", or how a connection was lost. `seconds` has the same
    by the second of the run in which they ended. `wrongs`: what each wrong answer was, and when."""

    port: int
    model: str
    causes: Counter[str] = field(default_factory=Counter)
    seconds: dict[int, Counter[str]] = field(default_factory=dict)
    wrongs: list[str] = field(default_factory=list)
    answered: float = 0.0  # when the last request that succeeded was sent
    began: float = field(default_factory=time.monotonic)
    _first: dict[str, Any] = field(default_factory=dict)  # answers by their text
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @abstractmethod
    def ask(self, connection: http.client.HTTPConnection, text: str) -> str:
        """What became of one request."""

    def start(self, users: int) -> None:
        texts = corpus.texts(None, _TEXTS)
        self._threads = [threading.Thread(target=self._user, args=(texts[at::users],)) for at in range(users)]
        for thread in self._threads:
            thread.start()

    def await_known(self, seconds: float) -> None:
        """Until each text was answered once, so that what is known came from an untouched service. Raises MachineError
        where that takes longer."""
        end = time.monotonic() + seconds
        while len(self._first) < _TEXTS:
            if time.monotonic() > end:
                raise MachineError(
                    "the load",
                    got=f"answers to {len(self._first)} of {_TEXTS} texts in {seconds:.0f} s",
                    expected="all",
                    fix="run on a machine with less else to do",
                )
            time.sleep(0.1)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(ASK_S)

    def _user(self, texts: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ASK_S)
        turn = 0
        while not self._stopped.is_set():
            text, turn, sent = texts[turn % len(texts)], turn + 1, time.monotonic()
            try:
                cause = self.ask(connection, text)
            except (OSError, http.client.HTTPException) as error:
                cause = f"connection: {type(error).__name__}"
            if cause != OK:
                connection.close()  # what is left of an answer must not be taken for that of the next
            self._count(cause, sent)
            if cause != OK:
                self._stopped.wait(_AFTER_FAILURE_S)
        connection.close()

    def _wrong(self, told: str) -> str:
        self.wrongs.append(f"wrong answer {time.monotonic() - self.began:.1f} s after the start: {told}")
        return WRONG

    def _count(self, cause: str, sent: float) -> None:
        with self._lock:
            self.causes[cause] += 1
            self.seconds.setdefault(int(time.monotonic() - self.began), Counter())[cause] += 1
            if cause == OK:
                self.answered = max(self.answered, sent)


@dataclass
class EmbeddingLoad(SteadyLoad):
    def ask(self, connection: http.client.HTTPConnection, text: str) -> str:
        answer = _posted(connection, "/v1/embeddings", {"model": self.model, "input": text, "truncate": True})
        body = answer.read()
        if answer.status != 200:
            return str(answer.status)
        vector: list[float] = json.loads(body)["data"][0]["embedding"]
        known = self._first.setdefault(text, vector)
        own = _product(vector, known)
        if own >= _SAME:
            return OK
        nearest = max((_product(vector, other), text) for text, other in list(self._first.items()))
        return self._wrong(
            f"{own:.3f} of its first answer; nearest {nearest[0]:.3f}, "
            f"to {'itself' if nearest[1] == text else 'another text'}"
        )


@dataclass
class CompletionLoad(SteadyLoad):
    """Greedy completions. One that ends with an event of an error was failed with a status; one that ends without its
    last event was lost; whatever text came must be the beginning of the first answer to the same prompt."""

    def ask(self, connection: http.client.HTTPConnection, text: str) -> str:
        fields = {"model": self.model, "prompt": text[:60], "max_tokens": _TOKENS, "temperature": 0, "stream": True}
        answer = _posted(connection, "/v1/completions", fields)
        if answer.status != 200:
            answer.read()
            return str(answer.status)
        found, error, ended = "", "", False
        for event in _events(answer):
            if event == "[DONE]":
                ended = True
                continue
            data = json.loads(event)
            error = error or str(data.get("error", {}).get("code") or data.get("error", {}).get("type") or "")
            found += "".join(choice["text"] for choice in data.get("choices", ()))
        return self._judged(text, found, error, ended)

    def _judged(self, text: str, found: str, error: str, ended: bool) -> str:
        whole = ended and not error
        known = self._first.setdefault(text, found) if whole else self._first.get(text, found)
        if known != found if whole else not known.startswith(found):
            return self._wrong(f"{found[:200]!r}, first {known[:200]!r}")
        if whole:
            return OK
        return f"stream ended: {error}" if error else "connection: stream cut"


def _product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _posted(connection: http.client.HTTPConnection, path: str, fields: dict[str, object]) -> http.client.HTTPResponse:
    connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
    return connection.getresponse()


def _events(answer: http.client.HTTPResponse) -> Iterator[str]:
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").decode().strip()
