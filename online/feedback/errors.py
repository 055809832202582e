"""What the store raises. Each refusal carries a name that programs can read.

runtime.errors.BadRequest
 `-- FeedbackRefused      this sample will never be taken: HTTP 400
runtime.errors.Unavailable
 `-- FeedbackUnavailable  not now: HTTP 503
      `-- FeedbackFull    the store's own bound is reached
"""

from __future__ import annotations

from enum import StrEnum

from runtime.errors import BadRequest, Unavailable


class Refusal(StrEnum):
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    UNKNOWN_KIND = "unknown_kind"
    UNKNOWN_REQUEST = "unknown_request"
    CONFLICT = "conflict"
    NOT_REDACTED = "not_redacted"


class FeedbackRefused(BadRequest):
    """The message holds nothing of the sample's text: it may be logged."""

    def __init__(self, reason: Refusal, message: str) -> None:
        self.reason = reason
        super().__init__(f"feedback refused ({reason}): {message}")


class FeedbackUnavailable(Unavailable):
    """The database is away, its disk is full, or it takes less than comes. The same sample may be sent again: a row
    that was written after all is acknowledged, not doubled."""


class FeedbackFull(FeedbackUnavailable):
    """The store holds as much as it may. Nothing that was acknowledged makes room by itself."""
