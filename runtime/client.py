"""The one client of our models over Triton's gRPC: vectors of texts; pieces of text as they are made.

Who measures or supervises has needs of its own beside it: the load generator times every message (`loadtest.requests`),
the probe must tell slow from dead (`runtime.server.probing`). All open their clients by `runtime.channel`.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.channel import connect, infer_input
from runtime.errors import InputError, ServerFault
from runtime.generation.interface import split_status
from runtime.prometheus import fetch, model_labels


@dataclass(frozen=True)
class Chunk:
    """What came since the last one. The last of all has `finish`, which is `stop` or `length`, and the counts."""

    text: str
    tokens: tuple[int, ...]
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


def served_model(metrics_address: str) -> str:
    """The one model that the server names in its metrics.

    Raises InputError when there is no such server, or when it names none or several.
    """
    try:
        text = fetch(f"http://{metrics_address}/metrics")
    except (OSError, http.client.HTTPException) as error:  # the latter: a port that does not speak HTTP
        raise InputError(
            f"server at {metrics_address}", got=str(error), expected="the metrics of a running `trireme serve`",
            fix="start it, give its --metrics address, or name the --model",
        ) from error  # fmt: skip
    names = sorted({labels["model"] for labels in model_labels(text) if "model" in labels})
    if len(names) != 1:
        raise InputError(
            f"models of {metrics_address}",
            got=", ".join(names) or "none",
            expected="exactly one",
            fix="name the --model",
        )
    return names[0]


def stream(
    address: str, model: str, text: str | None, options: Mapping[str, Any], *, timeout_s: float = 60.0
) -> Iterator[Chunk]:
    """One request over a connection of its own; see `Client.stream`."""
    with Client(address) as client:
        yield from client.stream(model, text, options, timeout_s=timeout_s)


class Client:
    """One connection, for one request at a time. Closed at the end of `with`."""

    def __init__(self, address: str) -> None:
        self._address, self._client = address, connect(address)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def vectors(self, model: str, texts: Sequence[str], *, timeout_s: float = 60.0) -> NDArray[np.float32]:
        """Embeddings, one row for each text, in one request. May be called from several threads at once.

        Raises InputError for a request that the server refuses, ServerFault when it fails.
        """
        from tritonclient.utils import InferenceServerException

        rows = np.array([[text.encode()] for text in texts], np.object_)
        try:
            result = self._client.infer(model, [infer_input("text", rows)], client_timeout=timeout_s)
        except InferenceServerException as error:
            raise _failure(model, self._address, error) from error
        values: NDArray[np.float32] = result.as_numpy("embedding")
        return values

    def stream(
        self, model: str, text: str | None, options: Mapping[str, Any], *, timeout_s: float = 60.0
    ) -> Iterator[Chunk]:
        """Pieces in their order, until the one with `finish`. `options` are further inputs of the model, by name:
        without `text`, `input_ids` must be one of them.

        `timeout_s` is the longest wait for the next piece. Raises InputError for a request that the server refuses,
        ServerFault when it fails or falls silent. Closing the iterator cancels the request.
        """
        from tritonclient.utils import InferenceServerException

        answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        values = {**({} if text is None else {"text_input": text}), "stream": True, **options}
        ended = False
        self._client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            with contextlib.suppress(InferenceServerException):  # a stream that broke has told the callback why
                self._client.async_stream_infer(model, [_tensor(name, value) for name, value in values.items()])
            while True:
                try:
                    result, error = answers.get(timeout=timeout_s)
                except Empty:
                    raise ServerFault(f"{model} at {self._address} was silent for {timeout_s:.0f} s") from None
                if error is not None:
                    ended = True
                    raise _failure(model, self._address, error)
                chunk = _chunk(result)
                ended = chunk.finish is not None
                yield chunk
                if ended:
                    return
        finally:
            # Triton 2.51 can crash on a cancellation that meets the end of its stream.
            self._client.stop_stream(cancel_requests=not ended)


def _tensor(name: str, value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    try:
        return infer_input(name, _array(name, items))
    except (UnicodeEncodeError, OverflowError) as error:
        expected = "text in UTF-8, or a number in range"
        raise InputError(name, got=str(error), expected=expected, fix="correct it") from error


def _array(name: str, items: Sequence[Any]) -> NDArray[Any]:
    if isinstance(items[0], str):
        return np.array([[item.encode() for item in items]], np.object_)
    if isinstance(items[0], bool | float):
        return np.array([items], np.bool_ if isinstance(items[0], bool) else np.float32)
    kind = np.uint64 if name in ("random_seed", "seed") else np.int32
    if not all(np.iinfo(kind).min <= item <= np.iinfo(kind).max for item in items):  # numpy would wrap it
        raise OverflowError(f"{items} does not fit {np.dtype(kind).name}")
    return np.array([items], kind)


def _chunk(result: Any) -> Chunk:
    def number(name: str) -> int:
        array = result.as_numpy(name)
        return int(array.flat[0]) if array is not None else 0

    text, tokens, finish = (result.as_numpy(name) for name in ("text_output", "output_ids", "finish_reason"))
    return Chunk(
        text=text.flat[0].decode(),
        tokens=tuple(int(token) for token in tokens.flat),
        finish=finish.flat[0].decode() if finish is not None else None,
        prompt_tokens=number("prompt_tokens"),
        completion_tokens=number("completion_tokens"),
    )


def _failure(model: str, address: str, error: Any) -> InputError | ServerFault:
    own, message = split_status(str(error.message()))
    status = own or str(error.status())
    if "INVALID_ARGUMENT" in status or "NOT_FOUND" in status or "unknown model" in message:
        return InputError(
            f"request to {model}", got=message, expected="a request that the model takes", fix="correct what is named"
        )
    return ServerFault(f"{model} at {address}: {message} ({status})")
