"""Objects as the fake API server holds them: the canonical values and defaults that a real one was seen to write.

Only those that make a second manager's apply of the same manifests a conflict: quantities, and what stands in lists
that are one value to server-side apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from builders.manifests.lint.quantity import canonical


def as_held(item: dict[str, Any]) -> None:
    """Changes the object in place."""
    for box, key in _quantities(item):
        box[key] = canonical(box[key])
    spec = item.get("spec") or {}
    if item["kind"] == "Job":
        for rule in (spec.get("podFailurePolicy") or {}).get("rules", []):
            for pattern in rule.get("onPodConditions", []):
                pattern.setdefault("status", "True")
    if item["kind"] == "PersistentVolume" and spec.get("storageClassName") == "":
        del spec["storageClassName"]
    if item["kind"] == "Gateway":
        for reference in _lists(spec, "certificateRefs"):
            _fill(reference, group="", kind="Secret")
    if item["kind"] == "GRPCRoute":
        for reference in _lists(spec, "parentRefs"):
            _fill(reference, group="gateway.networking.k8s.io", kind="Gateway")
        for reference in _lists(spec, "backendRefs"):
            _fill(reference, group="", kind="Service", weight=1)
        for match in _lists(spec, "matches"):
            _fill(match.get("method", {}), type="Exact")


def _fill(item: dict[str, Any], **defaults: Any) -> None:
    for key, value in defaults.items():
        item.setdefault(key, value)


def _quantities(part: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a quantity: amounts of resources, sizes, targets of metrics."""
    if isinstance(part, list):
        for inner in part:
            yield from _quantities(inner)
    if isinstance(part, dict):
        for key, inner in part.items():
            if key in ("requests", "limits", "capacity") and isinstance(inner, dict):
                yield from ((inner, name) for name in inner)
            elif key in ("sizeLimit", "averageValue"):
                yield part, key
            else:
                yield from _quantities(inner)


def _lists(part: Any, wanted: str) -> Iterator[dict[str, Any]]:
    """The items of every list of that name."""
    for inner in part if isinstance(part, list) else ():
        yield from _lists(inner, wanted)
    for key, inner in part.items() if isinstance(part, dict) else ():
        if key == wanted:
            yield from inner
        else:
            yield from _lists(inner, wanted)
