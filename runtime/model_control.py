"""Triton's model control over gRPC, for who holds the control secret: load, unload, and what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.settings import ADMIN_HEADER

CONTROL_HEADER = f"triton-grpc-protocol-{ADMIN_HEADER}"  # what `--grpc-restricted-protocol` asks for
_ASK_S = 30.0


def control_headers(secret: str) -> dict[str, str]:
    return {CONTROL_HEADER: secret}


def load(client: Any, models: Sequence[str], secret: str, timeout_s: float) -> None:
    """In this order. Each call answers only when the model is ready or has failed; raises what tritonclient raises."""
    for name in models:
        client.load_model(name, headers=control_headers(secret), client_timeout=timeout_s)


def unload(client: Any, models: Sequence[str], secret: str, timeout_s: float) -> None:
    """In this order. What is not loaded is no fault."""
    for name in models:
        client.unload_model(name, headers=control_headers(secret), client_timeout=timeout_s)


def not_ready(client: Any, models: Sequence[str], version: int) -> list[str]:
    """Those that do not serve this version."""
    return [name for name in models if not client.is_model_ready(name, str(version), client_timeout=_ASK_S)]
