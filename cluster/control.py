"""Secrets that pods mount and `trireme deploy` makes: what opens their repository control, and keys of their gateway.

They are there before the pods are, and a deployment never changes one. The pods' launcher reads the control secret at
its start, and Triton takes it as an argument: to change it, delete it, deploy, and restart the pods. Keys are read
again when they change.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.api import Cluster
from cluster.apply import MANAGER
from cluster.errors import ClusterError, Tolerated
from cluster.kinds import SECRETS, Object, metadata
from cluster.refusal import Operation

# As k8s/base/deployment.yaml mounts them; `trireme manifests` puts the spec's name and a dash before each.
CONTROL_SECRET, CONTROL_KEY, VERSION_MAP = "triton-control", "secret", "model-version"
KEYS_SECRET = "api-keys"
_CALLERS = ("client", "monitor")  # Prometheus' own, so that the other may change


def ensure_secrets(cluster: Cluster, documents: Sequence[Object]) -> list[str]:
    """Makes each with random values, where pods mount it and it is not there; returns those made, as namespace/name.

    A set that brings a Secret of this name is left to itself.
    """
    made = []
    for place, name in secret_places(cluster, documents):
        if _is_there(cluster, place, name):
            continue
        values = _control() if _is(name, CONTROL_SECRET) else _keys()
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        about = {"name": name, "namespace": place, "labels": {"app.kubernetes.io/managed-by": MANAGER}}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": about, "data": data}
        with Tolerated(409):  # another deployment was quicker; its value is as good
            action = Operation("create", SECRETS, place, name)
            cluster.send("POST", SECRETS.path(place), action, {"fieldManager": MANAGER}, body)
            made.append(f"{place}/{name}")
    return made


def _control() -> dict[str, str]:
    return {CONTROL_KEY: secrets.token_hex(24)}


def _keys() -> dict[str, str]:
    """The keys, and under `keys` their hashes, which alone the pods see: a line `name:sha256` each."""
    made = {name: secrets.token_urlsafe(32) for name in _CALLERS}
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in made.items()]
    return {"keys": "".join(lines), **made}


def secret_places(cluster: Cluster, documents: Sequence[Object]) -> list[tuple[str, str]]:
    """Namespace and name of every secret of ours that pods of the set mount and the set does not bring."""
    brought = {str(metadata(item).get("name")) for item in documents if item["kind"] == "Secret"}
    found = {
        (str(metadata(item).get("namespace") or cluster.namespace), name)
        for item in documents
        for known in (CONTROL_SECRET, KEYS_SECRET)
        if (name := _mounted(item, known)) is not None and name not in brought
    }
    return sorted(found)


def mounted_control(item: Object) -> str | None:
    """The control secret that a workload's pods mount."""
    return _mounted(item, CONTROL_SECRET)


def mounted_version_map(item: Object) -> str | None:
    """The ConfigMap from which a workload's new pods take the number of their model version."""
    return _mounted(item, VERSION_MAP, ("configMap", "name"))


def _mounted(item: Object, known: str, place: tuple[str, str] = ("secret", "secretName")) -> str | None:
    """`place`: where a volume has its kind, and that its name."""
    kind, key = place
    names = (str((volume.get(kind) or {}).get(key)) for volume in _volumes(item))
    return next((name for name in names if _is(name, known)), None)


def _is(name: str, known: str) -> bool:
    return name == known or name.endswith(f"-{known}")


def _is_there(cluster: Cluster, place: str, name: str) -> bool:
    """Who may make Secrets may not always read them; then the server says whether there is one already."""
    with Tolerated(403):
        return cluster.get(SECRETS, place, name) is not None
    return False


def control_secret(cluster: Cluster, name: str = CONTROL_SECRET, key: str = CONTROL_KEY) -> str:
    """What the pods were given. Raises ClusterError when there is no such Secret."""
    found = cluster.get(SECRETS, cluster.namespace, name)
    text = ((found or {}).get("data") or {}).get(key)
    if not text:
        raise ClusterError(
            f"Secret {cluster.namespace}/{name}",
            got="no such Secret" if found is None else f"no key {key}",
            expected="the secret that the pods' launcher was given",
            fix="`trireme deploy` makes it, and pods that start after that read it; or give --control-secret NAME/KEY "
            "as the pods' manifest names it",
        )
    return base64.b64decode(text).decode().strip()


def _volumes(part: Any) -> Iterator[Mapping[str, Any]]:
    """Those of every pod template in an object, wherever its kind keeps it."""
    if isinstance(part, Mapping):
        volumes = part.get("volumes")
        yield from (item for item in volumes if isinstance(item, Mapping)) if isinstance(volumes, list) else ()
    for inner in part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ():
        yield from _volumes(inner)
