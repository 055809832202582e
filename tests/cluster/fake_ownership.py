"""Who set which field: server-side apply's merge, for objects whose list items are known by `name` or `type`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

ATOMIC = {
    "metrics",
    "rules",
    "parentRefs",
    "backendRefs",
    "certificateRefs",
    "tolerations",
    "triggers",
}  # one value each
Path = tuple[Any, ...]  # keys of mappings; (key, text) for the item of a list in which item[key] == text
_SERVER_OWNED = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}


def merge(
    live: dict[str, Any], owners: dict[Path, set[str]], applied: dict[str, Any], manager: str
) -> tuple[dict[str, Any], dict[Path, set[str]], list[tuple[str, str]]]:
    """The merged object, its owners, and conflicts as (field, owner). Neither argument is changed.

    What the manager applied before and no longer applies goes, unless another manager owns it too.
    """
    result, owners = copy.deepcopy(live), {path: set(names) for path, names in owners.items()}
    result.update(apiVersion=applied["apiVersion"], kind=applied["kind"])
    result.setdefault("metadata", {})["name"] = applied["metadata"]["name"]
    before, wanted = dict(leaves(live)), dict(leaves(applied))
    conflicts = []
    for path, item in wanted.items():
        others = owners.get(path, set()) - {manager}
        if path in before and before[path] != item and others:
            conflicts += [(shown(path), owner) for owner in sorted(others)]
            owners[path] -= others
        if path not in _SERVER_OWNED:
            owners.setdefault(path, set()).add(manager)
        _put(result, path, item)
    for path in [path for path, names in owners.items() if manager in names and path not in wanted]:
        owners[path].discard(manager)
        if not owners[path]:
            del owners[path]
            _drop(result, path)
    return result, owners, conflicts


def leaves(item: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    if isinstance(item, dict) and item:
        return [found for key, part in item.items() for found in leaves(part, (*path, key))]
    if isinstance(item, list) and item and (key := _known_by(item)) and not (path and path[-1] in ATOMIC):
        return [found for part in item for found in leaves(part, (*path, (key, part[key])))]
    return [(path, item)]


def shown(path: Path) -> str:
    """As the server writes fields: `.spec.template.spec.containers[name="server"].image`."""
    return "".join(f'[{part[0]}="{part[1]}"]' if isinstance(part, tuple) else f".{part}" for part in path)


def _known_by(items: list[Any]) -> str | None:
    for key in ("name", "type"):
        if all(isinstance(item, dict) and key in item for item in items):
            return key
    return None


def _put(item: Any, path: Path, found: Any) -> None:
    for part, following in itertools.pairwise(path):
        item = _step(item, part, [] if isinstance(following, tuple) else {})
    item[path[-1]] = copy.deepcopy(found)


def _step(item: Any, part: Any, fresh: Any) -> Any:
    if not isinstance(part, tuple):
        if not isinstance(item.get(part), type(fresh)):
            item[part] = fresh
        return item[part]
    for entry in item:
        if entry.get(part[0]) == part[1]:
            return entry
    item.append({part[0]: part[1]})
    return item[-1]


def _drop(item: Any, path: Path) -> None:
    """Removes a field, and the mappings and list items that it leaves empty."""
    part = path[0]
    inner = (
        next((entry for entry in item if entry.get(part[0]) == part[1]), None)
        if isinstance(part, tuple)
        else item.get(part)
    )
    if inner is None and len(path) > 1:
        return
    if len(path) > 1:
        _drop(inner, path[1:])
        if inner:
            return
    if isinstance(part, tuple):
        item.remove(inner)
    else:
        item.pop(part, None)
