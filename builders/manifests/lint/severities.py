"""How grave the findings of each rule are.

error: an API server refuses it, or it cannot work. warning: it is accepted and works, and the rule says why it matters.
"""

from __future__ import annotations

from typing import Literal

Severity = Literal["error", "warning"]
_ERRORS = (
    "duplicate-key", "ignore-comment", "removed-api", "unknown-kind", "schema", "value", "quantity", "gpu-request",
    "request-over-limit", "missing-reference", "mount", "selector", "port", "name", "rollout", "autoscaler",
    "duplicate-object",
)  # fmt: skip
_WARNINGS = (
    "no-schema", "unknown-field", "not-here", "unused-volume", "port-name", "probe", "memory-limit", "memory-volume",
    "volume-size", "variable", "grace", "budget", "autoscaled-replicas", "claim", "pod-security", "read-only-root",
    "token", "image-tag", "rbac-wildcard",
)  # fmt: skip
SEVERITIES: dict[str, Severity] = {
    **dict.fromkeys(_ERRORS, "error"),
    **dict.fromkeys(_WARNINGS, "warning"),
}
