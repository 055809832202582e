"""Words by which processes of ours know each other's state. A supervisor tells the gateway beside it, a line at a time,
the first two, or why the server is not ready."""

from __future__ import annotations

READY = "ready"
CLOSED = "closed: "  # before a reason for which no answer of the server may be used either
STARTS_AGAIN = "is starting again"  # a model's ranks, in the refusals that it sends meanwhile
