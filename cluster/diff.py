"""What an apply would change, as the server sees it: defaults, ownership and admission included."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import yaml

from cluster.apply import Applied, bare


def changes_text(found: Sequence[Applied]) -> str:
    """One unified diff over all objects that would change; empty when none would."""
    return "".join(_one(item) for item in found if item.change not in ("unchanged", "kept") or item.conflict)


def _one(item: Applied) -> str:
    if item.change == "unchecked":
        return f"# {item.name}: new; the server can check it only once its namespace or kind is there\n"
    before, after = (dict(bare(version)) if version else {} for version in (item.before, item.after))
    if item.name.kind == "Secret":
        before, after = _masked(before, after, "before"), _masked(after, before, "after")
    names = f"live {item.name}", f"applied {item.name}"
    refused = (
        f"# {item.name}: deploy refuses this without --force-conflicts: {item.conflict}\n" if item.conflict else ""
    )
    return refused + "".join(
        f"{line}\n" for line in difflib.unified_diff(_lines(before), _lines(after), *names, n=3, lineterm="")
    )


def _lines(item: dict[str, Any]) -> list[str]:
    return yaml.safe_dump(item, sort_keys=True, width=120).splitlines() if item else []


def _masked(item: dict[str, Any], other: dict[str, Any], version: str) -> dict[str, Any]:
    """A Secret without its values: one can see that a value changes, not what it is."""
    hidden = {}
    for part in ("data", "stringData"):
        values, others = item.get(part) or {}, other.get(part) or {}
        hidden[part] = {key: "***" if others.get(key) == text else f"*** ({version})" for key, text in values.items()}
    return {**item, **{part: values for part, values in hidden.items() if values}}
