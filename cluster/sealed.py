"""Secrets of a recorded set: their contents lie in a Secret, and the record holds a seal in their place.

A set without Secrets needs no right to any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.kinds import SECRETS, Object, metadata
from cluster.packing import canonical, pack, stub, unpack
from cluster.refusal import Operation

_SEAL, _KEY = "sealed", "secrets"


def seal(documents: Sequence[Object]) -> tuple[list[Object], dict[str, Object]]:
    """The set with a seal for each Secret, and the Secrets by the digests that the seals name."""
    sealed: list[Object] = []
    contents: dict[str, Object] = {}
    for item in documents:
        if item["kind"] != "Secret" or _SEAL in item:
            sealed.append(item)
            continue
        digest = hashlib.sha256(canonical(item).encode()).hexdigest()
        contents[digest] = item
        sealed.append({**stub(item), _SEAL: digest})
    return sealed, contents


def read_sealed(cluster: Cluster, name: str, documents: Sequence[Object]) -> tuple[Object, ...]:
    """The set with its Secrets. Raises ClusterError where they are gone or may not be read."""
    if not any(_SEAL in item for item in documents):
        return tuple(documents)
    contents = _contents(cluster.get(SECRETS, cluster.namespace, name))
    missing = [str(metadata(item).get("name")) for item in documents if _SEAL in item and item[_SEAL] not in contents]
    if missing:
        raise ClusterError(
            f"Secret {cluster.namespace}/{name}",
            got=f"no contents of Secret {', '.join(missing)} of the recorded set",
            expected="what `trireme deploy` wrote",
            fix="deploy the set that has them",
        )
    return tuple(contents[item[_SEAL]] if _SEAL in item else item for item in documents)


def write_sealed(
    cluster: Cluster, about: Mapping[str, Any], coming: Mapping[str, Object], documents: Sequence[Object]
) -> None:
    """Keeps what `documents` hold seals of: what is there, and `coming`. Nothing where no set has a Secret."""
    needed = {item[_SEAL] for item in documents if _SEAL in item}
    if not coming or not needed:
        return
    name, old = about["name"], cluster.get(SECRETS, cluster.namespace, about["name"])
    contents = {digest: item for digest, item in {**_contents(old), **coming}.items() if digest in needed}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": dict(about), "data": {_KEY: pack(contents)}}
    action = Operation("update" if old else "create", SECRETS, cluster.namespace, name)
    path = SECRETS.path(cluster.namespace, name if old else None)
    cluster.send("PUT" if old else "POST", path, action, None, body)


def _contents(secret: Object | None) -> dict[str, Any]:
    if secret is None or _KEY not in (secret.get("data") or {}):
        return {}
    found: dict[str, Any] = unpack(secret["data"][_KEY])
    return found
