"""Whether a server that does not answer the probe works on something else: read from its own counters."""

from __future__ import annotations

import http.client
from typing import NamedTuple

from runtime.prometheus import fetch, metric_lines

# Rises when the executor has finished a step: a step that fails counts as none, and neither does a queue that fills.
_STEPS = "trireme_generation_executor_seconds_total"
# An ensemble counts whole requests. Its parts would not do: the tokenizer still reads texts when the encoder hangs.
_ANSWERS = "nv_inference_request_success"
# 1 while a generator's executor is lost and another one starts: ranks with all their weights take their time.
_RECOVERING = "trireme_generation_recovering"
_TIMEOUT_S = 2.0


class SeenProgress(NamedTuple):
    """Of one look: whether work was done since the last, and whether the model gets a new executor just now."""

    moved: bool
    recovering: bool


def work_done(page: str, model: str) -> float | None:
    """How much the model has done since its start, over all versions, in a unit that only the next call knows; None
    where the page does not tell."""
    steps = _sum(page, _STEPS, model)
    return steps if steps is not None else _sum(page, _ANSWERS, model)


def _sum(page: str, name: str, model: str) -> float | None:
    """Over all versions."""
    found = [value for rest, labels, value in metric_lines(page, name) if not rest and labels.get("model") == model]
    return sum(found) if found else None


class ServerProgress:
    """Compares looks at one server's metrics."""

    def __init__(self, address: str, model: str) -> None:
        self._address, self._model = address, model
        self._last: float | None = None

    def look(self) -> SeenProgress:
        """The first look cannot say that work was done."""
        page = self._page()
        now = work_done(page, self._model)
        moved = None not in (now, self._last) and now != self._last
        self._last = now if now is not None else self._last
        return SeenProgress(moved, bool(_sum(page, _RECOVERING, self._model)))

    def _page(self) -> str:
        try:
            return fetch(f"http://{self._address}/metrics", _TIMEOUT_S)
        except (OSError, http.client.HTTPException):
            return ""
