"""Copies of requests to a version that is tried: what it answers is compared and written down, and given to nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import numpy as np

from runtime.errors import ServingError
from runtime.gateway.access_log import LineFile
from runtime.gateway.door import refusal
from runtime.gateway.triton import Blob
from runtime.gateway.upstream import UpstreamGone

_AT_ONCE = 8
Ended = Callable[[int, float], None]


class Mirror:
    """No request waits for its copy. More copies than a few at once are left out, and counted."""

    def __init__(self, file: LineFile, seconds: float) -> None:
        self.file, self._seconds = file, seconds
        self._running: set[asyncio.Task[None]] = set()
        self.dropped = self.same = self.different = 0

    def infer(
        self,
        again: Coroutine[Any, Any, dict[str, Blob]],
        ended: Ended,
        answered: Mapping[str, Blob],
        request_id: str,
        versions: tuple[int, int],
    ) -> None:
        async def compare() -> dict[str, Any]:
            found = await again
            cosine = _worst_cosine(answered, found)
            return {"same": all(found.get(name) == one for name, one in answered.items()), "worst_cosine": cosine}

        if not self._start(compare(), ended, request_id, versions):
            again.close()

    def generate(
        self,
        again: AsyncGenerator[dict[str, Any], None],
        ended: Ended,
        answered: str,
        request_id: str,
        versions: tuple[int, int],
    ) -> None:
        async def compare() -> dict[str, Any]:
            texts, last = [], dict[str, Any]()
            async with aclosing(again) as pieces:
                async for last in pieces:
                    texts.append(str(last.get("text_output", "")))
            found = "".join(texts)
            told = {"answer": answered, "mirror_answer": found, "finish_reason": last.get("finish_reason")}
            return {"same": found == answered, **told, "completion_tokens": last.get("completion_tokens")}

        self._start(compare(), ended, request_id, versions)

    def _start(
        self, work: Coroutine[Any, Any, dict[str, Any]], ended: Ended, request_id: str, versions: tuple[int, int]
    ) -> bool:
        if len(self._running) >= _AT_ONCE:
            self.dropped += 1
            work.close()
            return False
        task = asyncio.get_running_loop().create_task(self._run(work, ended, request_id, versions))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    async def _run(
        self, work: Coroutine[Any, Any, dict[str, Any]], ended: Ended, request_id: str, versions: tuple[int, int]
    ) -> None:
        started, status, told = time.monotonic(), 200, dict[str, Any]()
        try:
            async with asyncio.timeout(self._seconds):
                told = await work
        except (ServingError, UpstreamGone, TimeoutError) as error:
            status = refusal(error, gone=lambda: None).status
        seconds = time.monotonic() - started
        ended(status, seconds)
        if status == 200:
            self.same += bool(told["same"])
            self.different += not told["same"]
        self.file.write(
            {
                "time": datetime.now(UTC), "id": request_id, "version": versions[0], "mirror": versions[1],
                "status": status, "ms": round(1e3 * seconds, 2), **told,
            }
        )  # fmt: skip


def _worst_cosine(answered: Mapping[str, Blob], found: Mapping[str, Blob]) -> float | None:
    """Of rows of the first output of numbers that both have."""
    for name, one in answered.items():
        other = found.get(name)
        if one.datatype == "FP32" and other is not None and other.shape == one.shape and len(one.shape) == 2:
            first, second = one.array().astype(np.float64), other.array().astype(np.float64)
            norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            return float(((first * second).sum(axis=1) / np.maximum(norms, 1e-12)).min())
    return None
