"""The gateway's feedback in the store: acknowledged once it is on the disk; samples by a thread nobody waits for."""

from __future__ import annotations

import asyncio
import importlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import orjson

from online.feedback.errors import FeedbackRefused, FeedbackUnavailable, Refusal
from online.feedback.samples import ServedRequest, parse_sample
from online.feedback.store import FeedbackStore, KeptTraffic
from runtime.errors import InputError
from runtime.gateway.feedback import Remembered
from runtime.gateway.refused import Refused

_WAITING = 256  # samples
_AGAIN_S = 5.0  # between two tries to open a database that is away
_WITHIN_S = 10.0
_TURN_S = 0.01
_CLOSE_S = 30.0
_STATUS = {Refusal.UNKNOWN_REQUEST: 404, Refusal.CONFLICT: 409, Refusal.TOO_LARGE: 413}


class StoreSink:
    """Owns the store. A database that is away when the gateway starts is tried again while it serves."""

    def __init__(self, url: str, share: float, redact: str | None, model: str, waiting: int = _WAITING) -> None:
        """`waiting`: samples that may wait. Raises InputError for a URL, a share or a hook that cannot be meant,
        MachineError without a driver."""
        if not 0 <= share <= 1:
            raise InputError("--sample-share", got=share, expected="from 0 to 1", fix="give a share of the answers")
        if redact is not None and not share:
            fix = "give --sample-share, or leave the hook out"
            raise InputError("--sample-redact", got="a share of 0", expected="texts that are kept", fix=fix)
        _require_no_password(url)
        self._url, self._model = url, model
        self._traffic = KeptTraffic(share) if redact is None else KeptTraffic(share, _hook(redact))
        self._store: FeedbackStore | None = None
        self._opening = threading.Lock()
        self._tried = float("-inf")
        self._why: FeedbackUnavailable | None = None
        try:
            self._opened()
        except FeedbackUnavailable as error:
            print(f"gateway: feedback is refused until the database is there: {error}", flush=True)
        self._samples: queue.Queue[ServedRequest | None] = queue.Queue(waiting)
        self._pending: set[str] = set()  # request ids of samples that wait
        self._results: Counter[str] = Counter(dict.fromkeys(("kept", "dropped", "failed"), 0))
        self._thread = threading.Thread(target=self._keep, name="samples", daemon=True)
        self._thread.start()

    async def add(self, about: Remembered, said: dict[str, Any]) -> bool:
        """Raises Refused, FeedbackUnavailable."""
        user = _user(about)
        try:
            sample = parse_sample(orjson.dumps({**said, "user": said["user"] or user}))
            store: FeedbackStore = await asyncio.to_thread(self._opened) if self._store is None else self._store
            async with asyncio.timeout(_WITHIN_S):
                while about.id in self._pending:  # else its texts would come too late
                    await asyncio.sleep(_TURN_S)
                # The request first: both stand in one queue, so in this order.
                known = store.note_served(self._served(about))
                added = store.submit(sample)
                await asyncio.wrap_future(known)
                new = await asyncio.wrap_future(added)
                return new == 1
        except FeedbackRefused as error:
            raise Refused(_STATUS.get(error.reason, 400), str(error), code=error.reason.value) from error
        except TimeoutError:
            raise FeedbackUnavailable(f"the feedback database did not answer within {_WITHIN_S:g} s") from None

    def wants(self, request_id: str) -> bool:
        return self._traffic.share > 0 and self._traffic.keeps(request_id)

    def sample(self, about: Remembered, prompt: str, answer: str) -> None:
        self._pending.add(about.id)
        try:
            self._samples.put_nowait(self._served(about, prompt, answer))
        except queue.Full:
            self._pending.discard(about.id)
            self._results["dropped"] += 1

    def counts(self) -> dict[str, int]:
        return dict(self._results)

    def close(self) -> None:
        """What was acknowledged is there; samples that wait are kept while there is time."""
        try:
            self._samples.put(None, timeout=_CLOSE_S)
            self._thread.join(_CLOSE_S)
        except queue.Full:
            pass  # the database is away: these were never promised
        if self._store is not None:
            self._store.close()

    def _served(self, about: Remembered, prompt: str | None = None, answer: str | None = None) -> ServedRequest:
        return ServedRequest(
            request_id=about.id, model=self._model, version=about.version, user=_user(about), prompt=prompt,
            answer=answer,
        )  # fmt: skip

    def _keep(self) -> None:
        """The hook is somebody else's code: it runs here, where it holds nobody up."""
        while (served := self._samples.get()) is not None:
            try:
                self._opened().note_served(served).add_done_callback(self._count)
            except Exception:  # noqa: BLE001 - counted; the next sample may be taken
                self._results["failed"] += 1
            finally:
                self._pending.discard(served.request_id)

    def _count(self, noted: Future[int]) -> None:
        self._results["kept" if noted.exception() is None else "failed"] += 1

    def _opened(self) -> FeedbackStore:
        """Raises FeedbackUnavailable while the database is away."""
        with self._opening:
            if self._store is not None:
                return self._store
            if self._why is not None and time.monotonic() - self._tried < _AGAIN_S:
                raise self._why
            self._tried = time.monotonic()
            try:
                self._store = FeedbackStore(self._url, traffic=self._traffic)
            except FeedbackUnavailable as error:
                self._why = error
                raise
            return self._store


def _user(about: Remembered) -> str | None:
    return about.caller or None


def _require_no_password(url: str) -> None:
    """Every user of the machine can read a process's arguments. Raises InputError."""
    place = url.partition("://")[2].rpartition("@")[0]
    if ":" in place:
        raise InputError(
            "--feedback-database", got="a URL with a password", expected="one without: arguments can be read by others",
            fix="put the password into the file that PGPASSFILE names",
        )  # fmt: skip


def _hook(text: str) -> Callable[[str], str]:
    """Raises InputError for what cannot be imported, or does not make a text of a text."""
    what, fix = "--sample-redact", "correct it"
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        made = found("a text")
    except Exception as error:  # whatever somebody else's code does at its import
        got = f"{text!r}: {type(error).__name__}: {error}"
        raise InputError(what, got=got, expected="module:function that takes a text", fix=fix) from error
    if not isinstance(made, str):
        got = f"{text!r}, which returns {type(made).__name__}"
        raise InputError(what, got=got, expected="a function that returns a text", fix=fix)
    return found  # type: ignore[no-any-return]
