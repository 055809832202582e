"""What a supervisor tells the gateway beside it, a line at a time: these words, or why the server is not ready."""

from __future__ import annotations

READY = "ready"
CLOSED = "closed: "  # before a reason for which no answer of the server may be used either
