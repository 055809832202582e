"""How the door says no: a status, a sentence without paths or stacks, in the shape of the dialect that was spoken."""

from __future__ import annotations

import re

import orjson

from runtime.errors import BadRequest, ServingError, TooLate, Unavailable
from runtime.generation.interface import split_status

RETRY_S = 1
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_AROUND = re.compile(r"\[request id: [^\]]*\] |^in ensemble '[^']*', ")  # whose parts are nobody's business
# What Triton's queue and the generator's say when they are full, and when a request has waited too long in them.
_FULL = ("maximum queue size", "wait already")
_LATE = ("timeout expired", "deadline")
STUB_ENDED = "the model's process has ended; it starts again"
_ENDED = "is not healthy"  # what Triton's backend says of a model whose process has ended


class Refused(ServingError):
    """`close`: the connection ends with the answer, for what comes on it is not to be read. `param`: the field at
    fault, `code`: a word for programs; both are OpenAI's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        close: bool = False,
        param: str | None = None,
        code: str | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.close = status, message, close
        self.param, self.code, self.allow = param, code, allow

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.status in (429, 503):
            found.append((b"retry-after", str(RETRY_S).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.allow is not None:
            found.append((b"allow", self.allow.encode()))
        if self.close:
            found.append((b"connection", b"close"))
        return found

    def body(self, openai: bool) -> bytes:
        if not openai:
            return orjson.dumps({"error": self.message})
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def as_refused(error: Exception) -> Refused:
    """Whatever was not raised for a client to read is told as no more than a failure."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, BadRequest):
        return Refused(400, str(error))
    if isinstance(error, TooLate):
        return Refused(504, str(error))
    if isinstance(error, Unavailable):
        return Refused(503, str(error))
    return Refused(500, "the request failed; the server log has the cause")


def no_model(asked: str, served: str) -> Refused:
    return Refused(404, f"no model {asked[:64]!r} here; it is {served!r}", param="model", code="model_not_found")


def require_model(asked: str, served: str) -> None:
    """Raises Refused for another model than the one that is served."""
    if asked != served:
        raise no_model(asked, served)


def upstream_refusal(status: int, said: str) -> Refused:
    """Of an error that Triton or a model sent. Triton 2.51 gives 400 for whatever a decoupled model sends, so the
    generator's own status, at the beginning of its text, goes before."""
    own, text = split_status(_AROUND.sub("", said))
    text = text[:500] or "no reason was given"
    lower = text.lower()
    if any(word in lower for word in _FULL):
        return Refused(429, text)
    if own == "DEADLINE_EXCEEDED" or any(word in lower for word in _LATE):
        return Refused(504, text)
    if own in ("UNAVAILABLE", "CANCELLED") or status == 503:
        return Refused(503, text)
    if not own and _ENDED in lower:
        return Refused(503, STUB_ENDED)
    if own == "INVALID_ARGUMENT" or (not own and 400 <= status < 500):
        return Refused(status if status in (400, 404) else 400, text)
    return Refused(500, "the model failed; the server log has the cause")
