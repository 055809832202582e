"""Readiness by a true inference, and repair of a dead Python stub.

Triton's own health checks stay green when a stub has crashed: every request then fails, and nothing restarts it. So
readiness here is one real request through the ensemble, and the repair is a reload of the models that fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.generation.interface import PROBE_ID, split_status
from runtime.triton import Ports, TritonServer
from runtime.versions import Versions

PROBE_TEXT = "trireme readiness probe"
PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 5.0
FAILURES_BEFORE_REPAIR = 2
MOST_REPAIRS = 5  # without a success between; then a new process is the better repair


@dataclass(frozen=True)
class Failure:
    """Why a probe failed. `busy`: the server refused or was slow, as a full queue does; nothing is broken."""

    reason: str
    busy: bool = False


class Supervisor:
    """Watches one server through its gRPC port. `versions`: those that may be loaded into it while it runs."""

    def __init__(self, server: TritonServer, versions: Versions | None = None) -> None:
        from tritonclient.grpc import InferenceServerClient

        self._server, self._versions = server, versions
        self._client = InferenceServerClient(server.grpc_address)

    def close(self) -> None:
        self._client.close()

    def wait_ready(self, timeout_s: float, asked_to_stop: threading.Event) -> None:
        """Returns after the first successful inference, or when asked to stop.

        Raises ServerFault when the server exits or is not ready in time.
        """
        end = time.monotonic() + timeout_s
        reason = "no probe was made"
        while time.monotonic() < end and not asked_to_stop.is_set():
            self._server.require_alive()
            failure = self.probe()
            if failure is None:
                return
            reason = failure.reason
            asked_to_stop.wait(0.1)
        if asked_to_stop.is_set():
            return
        raise ServerFault(f"Triton is not ready after {timeout_s:.0f} s ({reason}). Log:\n{self._server.log_tail()}")

    def probe(self) -> Failure | None:
        """One real inference, an ensemble's or one token of a generator's; None when it is sound."""
        from tritonclient.utils import InferenceServerException

        name = self._server.settings.ensemble
        text = f"{PROBE_TEXT} {time.time_ns()}"  # never twice the same, or a response cache would answer
        try:
            metadata = self._client.get_model_metadata(name, client_timeout=PROBE_TIMEOUT_S)
            names = [tensor.name for tensor in metadata.inputs]
            if "text_input" in names:
                return self._probe_generator(name, text)
            inputs = [infer_input(item, np.array([[text.encode()]], dtype=np.object_)) for item in names]
            result = self._client.infer(name, inputs, client_timeout=PROBE_TIMEOUT_S)
            values = result.as_numpy(metadata.outputs[0].name)
        except InferenceServerException as error:
            return _failure(error)
        if values is None or values.size == 0 or not np.isfinite(values).all():
            return Failure(f"{name} answered with {'nothing' if values is None else 'values that are not finite'}")
        self._answered(result)
        return None

    def _probe_generator(self, name: str, text: str) -> Failure | None:
        """A decoupled model answers on a stream."""
        from queue import Empty, SimpleQueue

        answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        inputs = [
            infer_input("text_input", np.array([[text.encode()]], np.object_)),
            infer_input("max_tokens", np.array([[1]], np.int32)),
        ]
        self._client.start_stream(
            lambda result, error: answers.put((result, error)),
            stream_timeout=PROBE_TIMEOUT_S,
        )
        ended = False
        try:
            self._client.async_stream_infer(name, inputs, request_id=PROBE_ID)
            result, error = answers.get(timeout=PROBE_TIMEOUT_S)
            ended = True
        except Empty:
            return Failure(f"{name} made no token within {PROBE_TIMEOUT_S:.0f} s", busy=True)
        finally:
            # Triton 2.51 can crash on a cancellation that meets the end of its stream.
            self._client.stop_stream(cancel_requests=not ended)
        if error is not None:
            return _failure(error)
        if result.as_numpy("output_ids") is None:
            return Failure(f"{name} answered without a token")
        self._answered(result)
        return None

    def _answered(self, result: Any) -> None:
        """A version that was loaded beside the one of the start, and now answers, is the server's from here on."""
        settings = self._versions.answered(int(result.get_response().model_version)) if self._versions else None
        if settings is not None:
            self._server.settings = settings

    def watch(
        self,
        stopped: Callable[[float], bool],
        report: Callable[[str], None],
        observe: Callable[[Failure | None], None] = lambda failure: None,
    ) -> None:
        """Probes until `stopped(seconds)` returns true; it is also the wait between probes. `observe` hears
        each result.

        A server that exits, or that no repair mends, raises ServerFault. A probe that fails twice running reloads the
        models; a server that is merely too busy to answer is left alone, because a reload would make it busier.
        """
        failures, repairs = 0, 0
        while not stopped(PROBE_INTERVAL_S):
            self._server.require_alive()
            failure = self.probe()
            observe(failure)
            if failure is None:
                if repairs:
                    report("serving again")
                failures, repairs = 0, 0
            elif not failure.busy:
                failures += 1
                if failures >= FAILURES_BEFORE_REPAIR:
                    report(f"probe failed ({failure.reason}); loading the models again")
                    if repairs == MOST_REPAIRS:
                        raise ServerFault(f"{repairs} repairs did not help: {failure.reason}")
                    self._repair()
                    failures, repairs = 0, repairs + 1

    def _repair(self) -> None:
        """Loads every model again, of the version that is known to work.

        Triton skips an unchanged model, so its files are touched first.
        """
        from tritonclient.utils import InferenceServerException

        if self._versions is not None:
            self._versions.discard()
        settings = self._server.settings
        for name in settings.load_order:
            adapter = self._server.repository / name / str(settings.version) / "model.py"
            if adapter.is_file():
                adapter.touch()
            try:
                self._client.load_model(name, headers=self._server.control_headers, client_timeout=60)
            except InferenceServerException:
                continue  # the next probe says whether it matters, and the repair is tried again


@contextmanager
def ready_server(repository: Path, timeout_s: float = 120) -> Iterator[TritonServer]:
    """A server on free ports that has answered a first inference; it ends with the block.

    Raises as `TritonServer` and `Supervisor.wait_ready` do.
    """
    with TritonServer(repository, Ports.free()) as server:
        with closing(Supervisor(server)) as supervisor:
            supervisor.wait_ready(timeout_s, threading.Event())
        yield server


def infer_input(name: str, array: NDArray[Any]) -> Any:
    """A request's tensor, with the shape and the type of the array."""
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    item = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    item.set_data_from_numpy(array)
    return item


def _failure(error: Any) -> Failure:
    """`busy` for a server that refuses work, as a full queue does."""
    status, reason = split_status(str(error.message()))
    overloaded = any(code in (status or str(error.status())) for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))
    return Failure(reason, busy=overloaded and "is not healthy" not in reason)
