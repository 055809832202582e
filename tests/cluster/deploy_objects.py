"""Small sets of objects that the tests of the deployment apply to the fake cluster, and the way to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.api import Cluster, Query
from cluster.kinds import ObjectName, Resource
from cluster.refusal import Operation
from cluster.rollout import Patience, RolloutProgress
from tests.cluster.fake_api import serving, write_kubeconfig
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_controllers import running

PATIENCE = Patience(timeout_s=30, problem_s=0.2, refresh_s=0.1, pause_s=0.02)
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps", True)
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments", True)
SERVER = ObjectName("apps/v1", "Deployment", "prod", "server")


def silent(found: Any) -> None:
    """A report that nobody reads."""


def deployment(image: str = "good", replicas: int = 2, name: str = "server") -> dict[str, Any]:
    labels = {"app": name}
    container = {"name": "triton", "image": image, "resources": {"limits": {"memory": "8Gi"}}}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
    }


def config_map(name: str = "settings", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data or {"a": "1"}}


def claim(name: str = "store") -> dict[str, Any]:
    spec = {"accessModes": ["ReadOnlyMany"], "storageClassName": "shared"}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def job(image: str = "good") -> dict[str, Any]:
    container = {"name": "build", "image": image}
    template = {"metadata": {}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "engines"}, "spec": {"template": template}}


def prepare(fake: FakeCluster, documents: Sequence[dict[str, Any]]) -> None:
    """Kinds and namespaces of a rendered set."""
    for item in documents:
        kind = str(item["kind"])
        plural = kind.lower() + ("es" if kind.endswith("s") else "s")
        plural = plural.removesuffix("ys") + "ies" if plural.endswith("cys") else plural
        if kind not in {known for known, _ in fake.kinds.values()}:
            fake.kinds[item["apiVersion"], plural] = (kind, True)
    for place in {item["metadata"].get("namespace") for item in documents} - {None}:
        fake.store(("v1", "namespaces", None, place), {"metadata": {"name": place}})


def apply_as(manager: str, cluster: Cluster, item: dict[str, Any], force: bool = False) -> dict[str, Any]:
    """A server-side apply by somebody else."""
    resource, about = cluster.resource(item["apiVersion"], item["kind"]), item["metadata"]
    assert resource is not None
    namespace, name = about.get("namespace") or cluster.namespace, about["name"]
    action = Operation("patch", resource, namespace, name)
    query: Query = {"fieldManager": manager, "force": force}
    return cluster.send("PATCH", resource.path(namespace, name), action, query, item)


@contextmanager
def connected(fake: FakeCluster, folder: Path, deadline_ticks: int = 10**6) -> Iterator[Cluster]:
    """A client of the fake cluster with its controllers at work."""
    with (
        serving(fake) as url,
        running(fake, deadline_ticks),
        Cluster.connect(write_kubeconfig(folder / "kubeconfig", url)) as cluster,
    ):
        yield cluster


class Seen:
    """A report that keeps every look."""

    def __init__(self) -> None:
        self.looks: list[list[RolloutProgress]] = []

    def __call__(self, found: Any) -> None:
        self.looks.append(list(found))

    @property
    def texts(self) -> list[str]:
        return [item.text for look in self.looks for item in look]
