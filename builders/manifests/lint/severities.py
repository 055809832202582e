"""How grave the findings of each rule are.

error: an API server refuses it, or it cannot work. warning: it is accepted and works, and the rule says why it matters.
"""

from __future__ import annotations

from typing import Literal

Severity = Literal["error", "warning"]
_ERRORS = (
    "duplicate-key", "ignore-comment", "removed-api", "schema", "value", "quantity", "gpu-request",
    "request-over-limit", "missing-reference", "mount", "selector", "port", "name", "rollout", "autoscaler", "claim",
    "duplicate-object", "probe", "memory-volume",
)  # fmt: skip
_WARNINGS = (
    "no-schema", "unknown-field", "memory-limit", "volume-size", "variable", "grace", "budget", "pod-security",
    "read-only-root", "token", "image-tag", "rbac-wildcard",
)  # fmt: skip
SEVERITIES: dict[str, Severity] = {
    **dict.fromkeys(_ERRORS, "error"),
    **dict.fromkeys(_WARNINGS, "warning"),
}
