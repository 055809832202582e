"""Many callers, one commit: while one batch goes to disk, the next one gathers. No caller waits for company."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from online.feedback.errors import FeedbackUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")
LARGEST_BATCH = 1000
_CLOSE_S = 30.0


class GroupCommit(Generic[Item, Result]):
    """Hands items to `commit`, in their order, from one thread.

    `commit` returns a result or an exception for each item, and only after they are safe; what it raises is the answer
    to every item of the batch.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        waiting: int = 10_000,
        largest_batch: int = LARGEST_BATCH,
    ) -> None:
        self._commit, self._waiting, self._largest = commit, waiting, largest_batch
        self._queue: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue(waiting)
        self._closed = False
        self._order = threading.Lock()  # nothing enters behind the end
        self._thread = threading.Thread(target=self._run, name="feedback-commit", daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[Result]:
        """Raises FeedbackUnavailable when too many wait already, or after `close`."""
        future: Future[Result] = Future()
        with self._order:
            if self._closed:
                raise FeedbackUnavailable("the feedback store is closed")
            try:
                self._queue.put_nowait((item, future))
            except queue.Full:
                raise FeedbackUnavailable(
                    f"{self._waiting} samples wait for the feedback database already; it takes less than comes"
                ) from None
        return future

    def close(self) -> None:
        """Commits what was submitted."""
        with self._order:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            batch = self._gather()
            live = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            if live:
                self._answer(live)
            if not batch:
                return

    def _gather(self) -> list[tuple[Item, Future[Result]]]:
        """Waits for one, takes all that are there. Empty at the end."""
        found: list[tuple[Item, Future[Result]]] = []
        while len(found) < self._largest:
            try:
                entry = self._queue.get(block=not found)
            except queue.Empty:
                break
            if entry is None:
                if found:
                    self._queue.put(None)  # once more, after these
                break
            found.append(entry)
        return found

    def _answer(self, live: list[tuple[Item, Future[Result]]]) -> None:
        try:
            results: Sequence[Result | Exception] = self._commit([item for item, _ in live])
        except Exception as error:  # noqa: BLE001  # handed to each caller; the thread must outlive it
            results = [error] * len(live)
        for (_, future), result in zip(live, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
