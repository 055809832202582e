"""Text streamed from a generator over gRPC: one call of Triton's `ModelStreamInfer` a request, many on a connection.

Triton's client library carries one stream a connection and starts a thread for each; these calls are its generated
stubs themselves, which under gevent cost a few greenlets a stream and no thread.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.errors import LoadInputError
from loadtest.requests.connection import bearer, kind_of_status
from loadtest.requests.interface import RequestError
from loadtest.requests.prompts import Prompt

NEEDED = {"text_output", "output_ids", "finish_reason", "prompt_tokens", "completion_tokens"}


@dataclass(frozen=True)
class Piece:
    """One response: how many tokens are new. The last has `finish`, and the counts of the whole."""

    tokens: int
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Stream:
    """What one request brought. Moments are seconds after it was due, which is never later than when it was sent."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)  # of responses with tokens: moment, tokens
    ended_s: float = 0.0
    prompt_tokens: int = 0  # known at the end alone
    left: bool = False  # the client hung up
    error: RequestError | None = None
    asked: int = 0  # tokens

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


def follow(pieces: Iterable[Piece], asked: Prompt, elapsed_s: Callable[[], float]) -> Stream:
    """Reads a stream to its end, or until its client leaves. What goes wrong is `error`; nothing is raised for it."""
    seen, last = Stream(asked=asked.output_tokens), None
    try:
        for piece in pieces:
            if piece.tokens:
                seen.arrivals.append((elapsed_s(), piece.tokens))
            if piece.finish is not None:
                last = piece
            elif asked.leave_after is not None and seen.tokens >= asked.leave_after:
                seen.left = True
                break
        if not seen.left:
            seen.prompt_tokens = _checked(last, seen.tokens, asked.output_tokens)
    except RequestError as error:
        seen.error = error
    seen.ended_s = elapsed_s()
    return seen


def _checked(last: Piece | None, tokens: int, asked: int) -> int:
    """Tokens of the prompt. Raises RequestError(BAD_OUTPUT) for a stream that does not add up."""
    if last is None:
        raise RequestError("BAD_OUTPUT", f"the stream ended after {tokens} token(s) without a finish reason")
    if not tokens == last.completion_tokens == asked:
        counts = f"{tokens} token(s) came, the server says {last.completion_tokens}, {asked} were asked for"
        raise RequestError("BAD_OUTPUT", counts)
    if last.prompt_tokens < 1:
        raise RequestError("BAD_OUTPUT", f"the server says that the prompt has {last.prompt_tokens} tokens")
    return last.prompt_tokens


class StreamConnection:
    """A connection of its own that carries any number of streams. Safe for many greenlets."""

    def __init__(self, address: str, timeout_s: float, key: str | None = None) -> None:
        """`key`: of a gateway that asks for one."""
        import grpc
        from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]  # as `Connection` has them
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub: Any = GRPCInferenceServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._metadata = tuple(bearer(key).items())

    def close(self) -> None:
        self._channel.close()

    def ask(self, model: str, prompt: Prompt, due: float) -> Stream:
        """`due` is a moment of time.perf_counter. What fails is the stream's `error`."""
        pieces = self._pieces(_request(model, prompt))
        try:
            return follow(pieces, prompt, lambda: time.perf_counter() - due)
        finally:
            pieces.close()  # a client that left, or an answer that is no good: the server need not go on

    def _pieces(self, request: Any) -> Generator[Piece]:
        import grpc

        from runtime.generation.interface import split_status  # which needs numpy

        call = self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout_s, metadata=self._metadata)
        try:
            for response in call:
                if response.error_message:
                    status, text = split_status(response.error_message)
                    raise RequestError(status or "UNKNOWN", text)
                yield _piece(response.infer_response)
        except grpc.RpcError as error:
            raise RequestError(kind_of_status(str(call.code())), call.details() or str(error)) from error
        finally:
            call.cancel()


def require_generator(metadata: Mapping[str, Any], transport: str) -> None:
    """Raises LoadInputError: it does not count its tokens, or the transport has no streams."""
    missing = NEEDED - {tensor["name"] for tensor in metadata.get("outputs", [])}
    if missing:
        raise LoadInputError(
            f"model {metadata['name']!r}",
            got=f"no output {', '.join(sorted(missing))}",
            expected="a generator that counts its tokens",
            fix="load-test the model that `trireme build` made",
        )
    if transport != "grpc":
        raise LoadInputError(
            f"protocol {transport}", got="a model that streams text", expected="grpc", fix="use the protocol grpc"
        )


def streams_text(metadata: Mapping[str, Any]) -> bool:
    """Whether a model is a generator, by its metadata (KServe v2, as JSON)."""
    return any(tensor["name"] == "text_input" for tensor in metadata.get("inputs", []))


def _request(model: str, prompt: Prompt) -> Any:
    from tritonclient.grpc.service_pb2 import ModelInferRequest

    text = prompt.text.encode()
    count = struct.pack("<i", prompt.output_tokens)
    request = ModelInferRequest(model_name=model)
    for name, datatype, raw in (
        ("text_input", "BYTES", struct.pack("<I", len(text)) + text),
        ("max_tokens", "INT32", count),
        ("min_length", "INT32", count),  # the end of the text is held off, so every run makes the same tokens
        ("stream", "BOOL", b"\x01"),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(raw)
    return request


def _piece(response: Any) -> Piece:
    raw = {tensor.name: data for tensor, data in zip(response.outputs, response.raw_output_contents, strict=False)}

    def number(name: str) -> int:
        return int.from_bytes(raw.get(name, b""), "little", signed=True)

    if "output_ids" not in raw:
        raise RequestError("BAD_OUTPUT", "a response without output_ids")
    finish = raw["finish_reason"][4:].decode() if "finish_reason" in raw else None  # 4 bytes of length in front
    return Piece(len(raw["output_ids"]) // 4, finish, number("prompt_tokens"), number("completion_tokens"))
