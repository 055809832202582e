"""The probe: one real inference through the server's gRPC port.

Triton's own health checks stay green when a stub has crashed, and every request then fails. So a server is ready when
it has answered.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.channel import connect, infer_input
from runtime.generation.interface import split_status
from runtime.told import STARTS_AGAIN

if TYPE_CHECKING:
    from queue import SimpleQueue

    _Answers = SimpleQueue[tuple[Any, Any]]  # a result, or an error

PROBE_TEXT = "trireme readiness probe"
PROBE_TIMEOUT_S = 5.0
_STREAM_S = 60.0  # longer than a server may stand still: whose probe waits so long has been ended before
# A server that starts again is asked again soon, and a channel of before must not lend its patience to a new one.
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Failure:
    """Why a probe failed. `busy`: the server refused or was slow, as a full queue does; nothing need be broken.
    `moving`: and it was seen to work for others meanwhile. `recovering`: it has lost its executor, and another one
    starts. `wrong`: the version that answers is not proven on this
    machine, so no answer of it may be used."""

    reason: str
    busy: bool = False
    moving: bool = False
    recovering: bool = False
    wrong: bool = False


class Probe:
    """Asks one server. `request_id` is what its generator does not count (see `runtime.generation.interface`)."""

    def __init__(self, address: str, request_id: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self.client = connect(address, *_CHANNEL)  # of one thread at a time
        self._request_id, self._timeout_s = request_id, timeout_s
        self._waiting: _Answers | None = None  # on the stream of a generator's probe that has no answer yet

    def close(self) -> None:
        self.client.close()

    def load(self, models: tuple[str, ...], headers: dict[str, str]) -> None:
        """Has the server load models, as their configurations now say. Whether it worked, the next answer tells."""
        from tritonclient.utils import InferenceServerException

        for name in models:
            try:
                self.client.load_model(name, headers=headers, client_timeout=60)
            except InferenceServerException:
                continue

    def ask(self, name: str) -> int | Failure:
        """One real inference, an ensemble's or one token of a generator's; the version that answered."""
        from tritonclient.utils import InferenceServerException

        text = f"{PROBE_TEXT} {time.time_ns()}"  # never twice the same, or a response cache would answer
        try:
            metadata = self.client.get_model_metadata(name, client_timeout=self._timeout_s)
            names = [tensor.name for tensor in metadata.inputs]
            if "text_input" in names:
                return self._ask_generator(name, text)
            inputs = [infer_input(item, np.array([[text.encode()]], dtype=np.object_)) for item in names]
            result = self.client.infer(name, inputs, client_timeout=self._timeout_s)
            values = result.as_numpy(metadata.outputs[0].name)
        except InferenceServerException as error:
            return failure_of(error)
        if values is None or values.size == 0 or not np.isfinite(values).all():
            return Failure(f"{name} answered with {'nothing' if values is None else 'values that are not finite'}")
        return int(result.get_response().model_version)

    def _ask_generator(self, name: str, text: str) -> int | Failure:
        """A decoupled model answers on a stream. One that waits in the queue of a busy server is left there, and the
        next call waits for it again: Triton 2.51 can crash on a cancellation that meets the end of its stream."""
        from queue import Empty

        answers = self._waiting or self._send(name, text)
        try:
            result, error = answers.get(timeout=self._timeout_s)
        except Empty:
            self._waiting = answers
            return Failure(f"{name} made no token within {self._timeout_s:.0f} s", busy=True)
        self._waiting = None
        self.client.stop_stream()
        if error is not None:
            return failure_of(error)
        if result.as_numpy("output_ids") is None:
            return Failure(f"{name} answered without a token")
        return int(result.get_response().model_version)

    def _send(self, name: str, text: str) -> _Answers:
        from queue import SimpleQueue

        from tritonclient.utils import InferenceServerException

        answers: _Answers = SimpleQueue()
        inputs = [
            infer_input("text_input", np.array([[text.encode()]], np.object_)),
            infer_input("max_tokens", np.array([[1]], np.int32)),
        ]
        self.client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=_STREAM_S)
        # A stream that has ended before it was written to: why, stands in `answers`.
        with suppress(InferenceServerException):
            self.client.async_stream_infer(name, inputs, request_id=self._request_id)
        return answers


def failure_of(error: Any) -> Failure:
    """`busy` for a server that refuses work, as a full queue does. Encoders over ranks say why."""
    status, reason = split_status(str(error.message()))
    overloaded = any(code in (status or str(error.status())) for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))
    busy = overloaded and "is not healthy" not in reason
    return Failure(reason, busy, recovering=busy and STARTS_AGAIN in reason)
