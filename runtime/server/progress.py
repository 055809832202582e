"""Whether a server that does not answer the probe works on something else: read from its own counters."""

from __future__ import annotations

import http.client

from runtime.prometheus import fetch, metric_lines

# Rises when the executor has finished a step: a step that fails counts as none, and neither does a queue that fills.
_STEPS = "trireme_generation_executor_seconds_total"
# An ensemble counts whole requests. Its parts would not do: the tokenizer still reads texts when the encoder hangs.
_ANSWERS = "nv_inference_request_success"
_TIMEOUT_S = 2.0


def work_done(page: str, model: str) -> float | None:
    """How much the model has done since its start, over all versions, in a unit that only the next call knows; None
    where the page does not tell."""
    for name in (_STEPS, _ANSWERS):
        found = [value for rest, labels, value in metric_lines(page, name) if not rest and labels.get("model") == model]
        if found:
            return sum(found)
    return None


class ServerProgress:
    """Compares looks at one server's metrics."""

    def __init__(self, address: str, model: str) -> None:
        self._address, self._model = address, model
        self._last: float | None = None

    def moved(self) -> bool:
        """Whether work was done since the last look. The first look cannot say so."""
        now = work_done(self._page(), self._model)
        moved = None not in (now, self._last) and now != self._last
        self._last = now if now is not None else self._last
        return moved

    def _page(self) -> str:
        try:
            return fetch(f"http://{self._address}/metrics", _TIMEOUT_S)
        except (OSError, http.client.HTTPException):
            return ""
