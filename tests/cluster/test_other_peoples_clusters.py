"""A namespace admin in a cluster of others: rights, warnings, an existing Namespace, and pods that are tried before."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from cluster.apply import MANAGER, apply
from cluster.control import ensure_secrets, mounted_version_map
from cluster.deploy import deploy
from cluster.errors import ClusterError
from tests.cluster.deploy_objects import (
    CONFIG_MAPS,
    PATIENCE,
    apply_as,
    claim,
    config_map,
    connected,
    deployment,
    job,
    prepare,
    silent,
)
from tests.cluster.fake_cluster import FakeCluster
from tests.conftest import needs_kubectl
from tests.manifests.test_overlay import SPECS, made

SHARED: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "prod", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
}


@pytest.fixture
def cluster(fake: FakeCluster, tmp_path: Path) -> Iterator[Cluster]:
    with connected(fake, tmp_path) as found:
        yield found


def with_control(name: str = "demo-triton-control") -> dict[str, Any]:
    item = deployment()
    item["spec"]["template"]["spec"]["volumes"] = [{"name": "control", "secret": {"secretName": name}}]
    return item


def test_a_namespace_that_is_to_be_made_needs_the_right(cluster: Cluster, fake: FakeCluster) -> None:
    fake.denied |= {("create", "namespaces"), ("create", "deployments")}
    fresh = {**SHARED, "metadata": {"name": "fresh"}}
    with pytest.raises(ClusterError, match=r"create namespaces \(cluster-wide\), create deployments") as caught:
        deploy(cluster, "demo", [fresh, deployment()], PATIENCE, silent)
    assert "a Role, and a ClusterRole for what belongs to the whole cluster," in caught.value.fix


def test_rights_on_single_objects_count(cluster: Cluster, fake: FakeCluster) -> None:
    """A Role with resourceNames: what it names may be done, and what it does not name is missing by name."""
    fake.denied |= {("patch", "deployments"), ("delete", "configmaps")}
    fake.granted |= {("patch", "deployments", "server"), ("delete", "configmaps", "settings")}
    deploy(cluster, "demo", [deployment(), config_map()], PATIENCE, silent)
    with pytest.raises(ClusterError, match=r"no right to delete configmaps more;"):
        deploy(cluster, "demo", [deployment(), config_map(), config_map("more")], PATIENCE, silent)


def test_warnings_of_the_server_are_shown_once(cluster: Cluster, fake: FakeCluster) -> None:
    told: list[str] = []
    cluster.warn = told.append
    fake.warnings["ConfigMap"] = 'would violate PodSecurity "restricted:latest": \\ something'
    list(apply(cluster, [config_map(), config_map("other")]))
    assert told == ['would violate PodSecurity "restricted:latest": \\ something']


def test_warnings_go_to_standard_error(cluster: Cluster, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    fake.warnings["ConfigMap"] = "this version is deprecated"
    list(apply(cluster, [config_map()]))
    assert capsys.readouterr().err == "warning: this version is deprecated\n"


def test_each_spec_has_a_control_secret_of_its_own(cluster: Cluster, fake: FakeCluster) -> None:
    first, second = with_control("first-triton-control"), with_control("second-triton-control")
    assert ensure_secrets(cluster, [first]) == ["prod/first-triton-control"]
    assert ensure_secrets(cluster, [first, second]) == ["prod/second-triton-control"]
    held = {key[3]: item["data"]["secret"] for key, item in fake.find("v1", "secrets")}
    assert held["first-triton-control"] != held["second-triton-control"]
    version = {"name": "version", "configMap": {"name": "first-model-version", "optional": True}}
    first["spec"]["template"]["spec"]["volumes"].append(version)
    assert mounted_version_map(first) == "first-model-version"


def test_keys_of_the_gateway_are_made_where_pods_mount_them(cluster: Cluster, fake: FakeCluster) -> None:
    """What the pods mount are hashes that fit the keys beside them, as the gateway reads them."""
    assert ensure_secrets(cluster, [with_control("demo-api-keys")]) == ["prod/demo-api-keys"]
    assert ensure_secrets(cluster, [with_control("demo-api-keys")]) == []
    ((_, made),) = fake.find("v1", "secrets")
    data = {key: base64.b64decode(value) for key, value in made["data"].items()}
    lines = dict(line.split(":") for line in data["keys"].decode().splitlines())
    assert lines == {name: hashlib.sha256(data[name]).hexdigest() for name in ("client", "monitor")}
    assert data["client"] != data["monitor"]
    assert ensure_secrets(cluster, [with_control("their-own-keys")]) == []


def test_a_control_secret_that_may_not_be_read_is_not_made_twice(cluster: Cluster, fake: FakeCluster) -> None:
    ensure_secrets(cluster, [with_control()])
    before = fake.objects["v1", "secrets", "prod", "demo-triton-control"]
    fake.denied.add(("get", "secrets"))
    assert ensure_secrets(cluster, [with_control()]) == []
    assert fake.objects["v1", "secrets", "prod", "demo-triton-control"] == before


QUOTA = "exceeded quota: cpu, requested: limits.cpu=5, used: 0, limited: limits.cpu=4"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (QUOTA, r"exceeded quota: cpu.*kubectl describe quota"),
        ("no PriorityClass with name serving was found", "kubernetes.priority_class: kubectl get priorityclass"),
        ('violates PodSecurity "restricted:latest": runAsNonRoot != true', "set the securityContext"),
        ("failed quota: cpu: must specify limits.cpu for: fetch", "ResourceQuota"),
    ],
)
@pytest.mark.parametrize("documents", [[deployment()], [job()]], ids=["Deployment", "Job"])
def test_pods_are_tried_before_anything_changes(
    cluster: Cluster, fake: FakeCluster, message: str, expected: str, documents: list[Any]
) -> None:
    fake.quota["Pod"] = message
    with pytest.raises(ClusterError, match=rf"a pod of \w+ prod/\w+: [\s\S]*{expected}"):
        deploy(cluster, "demo", [config_map(), *documents], PATIENCE, silent)
    assert cluster.get(CONFIG_MAPS, "prod", "settings") is None
    assert not [key for key, _ in fake.find("v1", "pods")]


def test_pods_that_make_room_are_not_measured_by_what_they_use(cluster: Cluster, fake: FakeCluster) -> None:
    """Without surge an old pod leaves first, so a quota that is used up is no reason; another refusal is."""

    def rolling(image: str, surge: int) -> dict[str, Any]:
        item = deployment(image)
        item["spec"]["strategy"] = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": 1}}
        return item

    deploy(cluster, "demo", [rolling("good", 0)], PATIENCE, silent)
    fake.quota["Pod"] = QUOTA
    deploy(cluster, "demo", [rolling("better", 0)], PATIENCE, silent)
    deploy(cluster, "demo", [rolling("better", 0)], PATIENCE, silent)
    with pytest.raises(ClusterError, match="exceeded quota"):
        deploy(cluster, "demo", [rolling("best", 1)], PATIENCE, silent)


def test_what_may_not_be_tried_is_said(cluster: Cluster, fake: FakeCluster) -> None:
    told: list[str] = []
    cluster.warn = told.append
    fake.denied |= {("create", "pods"), ("get", "storageclasses")}
    deploy(cluster, "demo", [deployment(), claim()], PATIENCE, silent)
    assert any("no right to create pods in prod" in text for text in told)
    assert any("no right to get storage classes" in text for text in told)


def test_a_storage_class_that_is_not_there(cluster: Cluster, fake: FakeCluster) -> None:
    fake.remove(("storage.k8s.io/v1", "storageclasses", None, "shared"))
    with pytest.raises(ClusterError, match=r"storage class shared, which the cluster does not have.*get storageclass"):
        deploy(cluster, "demo", [claim()], PATIENCE, silent)
    volume = {"metadata": {"name": "v"}, "spec": {"storageClassName": "shared"}}
    fake.store(("v1", "persistentvolumes", None, "v"), volume)  # made by hand, of a class that is no object
    assert deploy(cluster, "demo", [claim()], PATIENCE, silent).revision.outcome == "ready"


def test_no_default_class_is_said(cluster: Cluster) -> None:
    told: list[str] = []
    cluster.warn = told.append
    anywhere = claim()
    del anywhere["spec"]["storageClassName"]
    deploy(cluster, "demo", [anywhere], PATIENCE, silent)
    assert any("the cluster has no default" in text for text in told)


@needs_kubectl
@pytest.mark.parametrize("name", SPECS)
def test_two_managers_of_the_same_manifests_agree(name: str, cluster: Cluster, fake: FakeCluster) -> None:
    """`kubectl apply -k`, and then `trireme deploy`: what is written is what the server holds, so nothing conflicts."""
    documents = [dict(item.data) for item in made(name).objects]
    prepare(fake, documents)
    for item in documents:
        apply_as("kubectl", cluster, item)
    assert {found.change for found in apply(cluster, documents)} <= {"unchanged", "kept"}
    owners = fake.owners["apps/v1", "deployments", documents[-1]["metadata"].get("namespace"), "minilm-serving"]
    assert {MANAGER, "kubectl"} in owners.values()


@pytest.mark.parametrize(
    ("written", "field"),
    [
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "nvidia.com/gpu"),
        ({"resources": {"limits": {"memory": "4096Mi"}}}, "memory"),
    ],
)
def test_other_values_would_conflict(cluster: Cluster, written: dict[str, Any], field: str) -> None:
    """The test above would see it: as the server holds them, these differ from what is applied."""
    item = deployment()
    item["spec"]["template"]["spec"]["containers"][0].update(written)
    apply_as("kubectl", cluster, item)
    with pytest.raises(ClusterError, match=rf"{field} set by kubectl"):
        list(apply(cluster, [item]))
