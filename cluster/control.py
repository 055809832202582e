"""The Secret that opens the pods' repository control: made once, read by who loads a model version.

The pods' launcher reads it at its start, and Triton takes it as an argument, so it is there before the pods are and is
never changed by a deployment. To change it, delete it, deploy, and restart the pods.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.api import Cluster
from cluster.apply import MANAGER
from cluster.errors import ClusterError
from cluster.kinds import SECRETS, Object, metadata
from cluster.refusal import Operation

CONTROL_SECRET, CONTROL_KEY = "triton-control", "secret"  # as k8s/base/deployment.yaml mounts it


def ensure_control_secret(cluster: Cluster, documents: Sequence[Object]) -> list[str]:
    """Makes it, with a random value, in each namespace whose pods mount it and where it is not; returns these.

    A set that brings a Secret of this name is left to itself.
    """
    if any(item["kind"] == "Secret" and metadata(item).get("name") == CONTROL_SECRET for item in documents):
        return []
    places = {str(metadata(item).get("namespace") or cluster.namespace) for item in documents if _mounts(item)}
    missing = sorted(place for place in places if cluster.get(SECRETS, place, CONTROL_SECRET) is None)
    for place in missing:
        value = base64.b64encode(secrets.token_hex(24).encode()).decode()
        about = {"name": CONTROL_SECRET, "namespace": place, "labels": {"app.kubernetes.io/managed-by": MANAGER}}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": about, "data": {CONTROL_KEY: value}}
        with _already_there():
            action = Operation("create", SECRETS, place, CONTROL_SECRET)
            cluster.send("POST", SECRETS.path(place), action, {"fieldManager": MANAGER}, body)
    return missing


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


def _mounts(item: Object) -> bool:
    secrets_mounted = (volume.get("secret") or {} for volume in _volumes(item))
    return any(secret.get("secretName") == CONTROL_SECRET for secret in secrets_mounted)


def _volumes(part: Any) -> Iterator[Mapping[str, Any]]:
    """Those of every pod template in an object, wherever its kind keeps it."""
    if isinstance(part, Mapping):
        volumes = part.get("volumes")
        yield from (item for item in volumes if isinstance(item, Mapping)) if isinstance(volumes, list) else ()
    for inner in part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ():
        yield from _volumes(inner)


@contextlib.contextmanager
def _already_there() -> Iterator[None]:
    """Another deployment was quicker; its value is as good."""
    try:
        yield
    except ClusterError as error:
        if error.code != 409:
            raise
