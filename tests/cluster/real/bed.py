"""A namespace with a random name to try things in, in a cluster that KUBECONFIG names or on the project's small server.

The tests ask both the same. `NamedBed` says by name what it lacks, and the test is skipped. All that is made lies in
the namespace, which goes at the end; one that a killed run has left goes by
`kubectl delete namespace -l app.kubernetes.io/managed-by=trireme-test`.

TRIREME_TEST_IMAGE names an image with a shell that the cluster's nodes can pull; no image may have its name with
`-no-such-tag` behind it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api import Cluster
from cluster.apply import apply, dry_run
from cluster.deploy import Deployed, deploy, undo
from cluster.diff import changes_text
from cluster.errors import Tolerated
from cluster.kinds import NAMESPACES, PODS, Object, Resource, metadata
from cluster.refusal import Operation
from cluster.rights import may
from cluster.rollout import Patience
from tests.cluster.deploy_objects import PATIENCE, apply_as, connected, prepare, silent
from tests.cluster.fake_cluster import FakeCluster

IMAGE = os.environ.get("TRIREME_TEST_IMAGE", "busybox:1.37")
WRONG = f"{IMAGE}-no-such-tag"
ABSENT = "trireme-test-absent"  # the name of what no cluster has
MARK = {"app.kubernetes.io/managed-by": "trireme-test"}
# What k8s/README.md says that a namespace admin needs, by group: verbs on resources.
ADMIN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "apps": {"deployments": ("get", "create", "patch", "delete", "list", "watch"), "replicasets": ("list",)},
    "batch": {"jobs": ("get", "create", "patch", "delete", "list", "watch")},
    "": {
        "configmaps": ("get", "create", "patch", "delete", "update"), "pods": ("list",), "pods/log": ("get",),
        "events": ("list",), "persistentvolumeclaims": ("get",), "secrets": ("create",),
    },
}  # fmt: skip
_NODES = Resource("v1", "Node", "nodes", False)
_ROLES = Resource("rbac.authorization.k8s.io/v1", "Role", "roles", True)
_QUOTAS = Resource("v1", "ResourceQuota", "resourcequotas", True)
_ACCOUNTS = Resource("v1", "ServiceAccount", "serviceaccounts", True)
_WAIT_S = 20.0  # for what the control plane makes by itself


class Bed:
    """`place` is the namespace. `cluster` may do everything there; what it warns of stands in `warned`."""

    patience: Patience

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.place = cluster, cluster.namespace
        self.warned: list[str] = []
        cluster.warn = self.warned.append

    def deploy(self, documents: Sequence[Object], name: str = "demo", **more: Any) -> Deployed:
        return deploy(self.cluster, name, documents, self.patience, silent, **more)

    def undo(self, name: str = "demo") -> Deployed:
        return undo(self.cluster, name, self.patience, silent)

    def get(self, resource: Resource, name: str) -> Object:
        found = self.cluster.get(resource, self.place, name)
        assert found is not None, f"no {resource.kind} {name}"
        return found

    def names(self, resource: Resource) -> set[str]:
        return {metadata(item)["name"] for item in self.cluster.list_objects(resource, self.place).items}

    def needs(self, verb: str, resource: Resource) -> None:
        """The right to it, for who has the cluster."""

    def needs_nodes(self) -> None:
        """Nodes that start containers."""

    def knows(self, documents: Sequence[Object]) -> list[Object]:
        """Those of kinds that the cluster has, which then must let them be applied."""
        raise NotImplementedError

    def apply_by_kubectl(self, documents: Sequence[Object], *options: str) -> None:
        raise NotImplementedError

    def admin(self, *, secrets: bool) -> AbstractContextManager[Path]:
        """A kubeconfig of somebody with the rights of ADMIN and no others; without `secrets`, none on Secrets."""
        raise NotImplementedError

    def leave_no_room(self, image: str) -> None:
        """A quota that refuses every pod. On the small server, those of the image."""
        raise NotImplementedError

    def judge_pods(self, refusal: str) -> None:
        """The small server judges no pods: it is told what the real one says."""

    def judges(self, title: str, puts: Mapping[str, Any]) -> bool:
        """Whether the server can know that an edit of `field_mistakes.yaml` is one."""
        return True


class SmallBed(Bed):
    patience = PATIENCE

    def __init__(self, cluster: Cluster, fake: FakeCluster, folder: Path) -> None:
        super().__init__(cluster)
        self.fake, self._folder = fake, folder
        fake.images[WRONG] = "missing"
        fake.kinds["v1", "resourcequotas"] = ("ResourceQuota", True)

    def knows(self, documents: Sequence[Object]) -> list[Object]:
        prepare(self.fake, [dict(item) for item in documents])
        return list(documents)

    def apply_by_kubectl(self, documents: Sequence[Object], *options: str) -> None:
        for item in documents:
            apply_as("kubectl", self.cluster, dict(item))

    @contextmanager
    def admin(self, *, secrets: bool) -> Iterator[Path]:
        allowed = {(verb, name) for _, name, verbs in _rules(secrets) for verb in verbs}
        before, self.fake.denied = self.fake.denied, _AllBut(allowed)
        try:
            yield _kubeconfig(self._folder, {"server": self.cluster.host}, "any", self.place)
        finally:
            self.fake.denied = before

    def leave_no_room(self, image: str) -> None:
        self.fake.images[image] = "quota"

    def judge_pods(self, refusal: str) -> None:
        self.fake.quota["Pod"] = refusal

    def judges(self, title: str, puts: Mapping[str, Any]) -> bool:
        return title == "Deployment/web" and set(puts) in ({"spec template metadata labels"}, {"kind"})


class NamedBed(Bed):
    patience = Patience(timeout_s=180, problem_s=10)

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(cluster)
        self._folder = folder

    def needs(self, verb: str, resource: Resource) -> None:
        if not may(self.cluster, Operation(verb, resource, self.place if resource.namespaced else None)):
            self._lacks(f"the right to {verb} {resource.granted_as}")

    def needs_nodes(self) -> None:
        self.needs("list", _NODES)
        nodes = self.cluster.list_objects(_NODES, "").items
        if not [node for node in nodes if "kwok.x-k8s.io/node" not in (metadata(node).get("annotations") or {})]:
            self._lacks("a node that starts containers")

    def knows(self, documents: Sequence[Object]) -> list[Object]:
        found = {item["kind"]: self.cluster.resource(item["apiVersion"], item["kind"]) for item in documents}
        for resource in found.values():
            for verb in ("get", "create", "patch") if resource else ():
                self.needs(verb, resource)
        return [item for item in documents if found[item["kind"]]]

    def apply_by_kubectl(self, documents: Sequence[Object], *options: str) -> None:
        """The program, as people call it."""
        command = ["kubectl", "apply", *options, "--namespace", self.place, "--filename", "-"]
        text = yaml.safe_dump_all([dict(item) for item in documents])
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    @contextmanager
    def admin(self, *, secrets: bool) -> Iterator[Path]:
        self.needs("create", _ROLES)
        name = "admin" if secrets else "admin-without-secrets"
        list(apply(self.cluster, _account(name, self.place, secrets)))
        path = f"{_ACCOUNTS.path(self.place, name)}/token"
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        action = Operation("create", _ACCOUNTS, self.place, name, "token")
        token = self.cluster.send("POST", path, action, body=review)["status"]["token"]
        settings = self.cluster.api.configuration
        server = {"server": self.cluster.host, "insecure-skip-tls-verify": not settings.verify_ssl}
        server |= {"certificate-authority": settings.ssl_ca_cert} if settings.ssl_ca_cert else {}
        file = _kubeconfig(self._folder, server, token, self.place)
        with Cluster.connect(file) as found:
            _wait_until(lambda: may(found, Operation("list", PODS, self.place)), "the rights of the new account")
        yield file

    def leave_no_room(self, image: str) -> None:
        quota = {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none"},
            "spec": {"hard": {"pods": "0"}},
        }
        list(apply(self.cluster, [quota]))
        _wait_until(lambda: "hard" in self.get(_QUOTAS, "none").get("status", {}), "the quota's status")

    def _lacks(self, what: str) -> None:
        pytest.skip(f"{self.cluster.host} lacks {what}")


class _AllBut(set[tuple[str, str]]):
    """Every right but those given."""

    def __contains__(self, right: object) -> bool:
        return not super().__contains__(right)


def _rules(secrets: bool) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for group, resources in ADMIN.items():
        yield from ((group, name, verbs) for name, verbs in resources.items() if secrets or name != "secrets")


def _account(name: str, place: str, secrets: bool) -> list[Object]:
    group, about = "rbac.authorization.k8s.io", {"name": name}
    rules = [{"apiGroups": [where], "resources": [what], "verbs": [*verbs]} for where, what, verbs in _rules(secrets)]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": about},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": about, "rules": rules},
        {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": about,
         "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
         "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": place}]},
    ]  # fmt: skip


def _kubeconfig(folder: Path, server: Mapping[str, Any], token: str, namespace: str) -> Path:
    file = folder / f"kubeconfig-{secrets.token_hex(3)}"
    context = {"cluster": "bed", "user": "admin", "namespace": namespace}
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "bed",
        "clusters": [{"name": "bed", "cluster": dict(server)}], "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "bed", "context": context}],
    }  # fmt: skip
    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(config))
    return file


def _wait_until(there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _WAIT_S
    while not there():
        assert time.monotonic() < end, f"{what} did not come within {_WAIT_S:.0f} s"
        time.sleep(0.2)


@contextmanager
def small_bed(folder: Path) -> Iterator[Bed]:
    fake = FakeCluster()
    with connected(fake, folder), _own_namespace(folder / "kubeconfig") as cluster:
        yield SmallBed(cluster, fake, folder)


@contextmanager
def named_bed(folder: Path) -> Iterator[Bed]:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    with Cluster.connect() as cluster:
        if not may(cluster, Operation("create", NAMESPACES)):
            pytest.skip(f"{cluster.host} lacks the right to create namespaces")
    with _own_namespace(None) as cluster:
        yield NamedBed(cluster, folder)


@contextmanager
def _own_namespace(kubeconfig: Path | None) -> Iterator[Cluster]:
    place = f"trireme-test-{secrets.token_hex(4)}"
    with Cluster.connect(kubeconfig, namespace=place) as cluster:
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": place, "labels": MARK}}
        cluster.send("POST", NAMESPACES.path(), Operation("create", NAMESPACES), body=body)
        try:
            yield cluster
        finally:
            with Tolerated(404):
                cluster.send("DELETE", NAMESPACES.path(None, place), Operation("delete", NAMESPACES, None, place))


def assert_unchanged(bed: Bed, documents: Sequence[Object]) -> None:
    """An apply changes nothing, nor does it conflict. Controllers write annotations at their own time, so it is asked
    again for as long as they may.
    """
    changed: dict[str, str] = {}
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        changed = {str(item.name): item.change for item in apply(bed.cluster, documents) if item.change != "unchanged"}
        if not changed:
            break
    assert not changed
    assert changes_text(dry_run(bed.cluster, documents, show_conflicts=True)) == ""


def labelled(bed: Bed, labels: Mapping[str, str]) -> None:
    """The namespace's owner puts labels on it."""
    item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": bed.place, "labels": dict(labels)}}
    apply_as("owner", bed.cluster, item)


def deployment(image: str = IMAGE, name: str = "server", **pod: Any) -> dict[str, Any]:
    """One pod that lives until it is told to go, at Pod Security restricted."""
    labels, script = {"app": name}, "trap 'exit 0' TERM; sleep 86400 & wait"
    template = {"metadata": {"labels": labels}, "spec": {**_pod(image, script), **pod}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def job(image: str = IMAGE, script: str = "true") -> dict[str, Any]:
    template = {"metadata": {}, "spec": {**_pod(image, script), "restartPolicy": "Never"}}
    spec = {"backoffLimit": 0, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "engines"}, "spec": spec}


def _pod(image: str, script: str) -> dict[str, Any]:
    amounts = {"cpu": "10m", "memory": "16Mi"}
    box = {
        "name": "box", "image": image, "command": ["sh", "-c", script],
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    user = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    return {"automountServiceAccountToken": False, "securityContext": user, "containers": [box]}
