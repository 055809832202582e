"""A namespace that others use too, and two specs in one: nothing of theirs is selected, renamed or shared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.manifests.lint.objects import ObjectSet, Pod, at, mapping, matches, rows
from builders.manifests.lint.quantity import canonical
from builders.manifests.lint.resources import written_quantities
from builders.manifests.overlay import overlay_files, write_manifests
from builders.spec import DeploymentSpec, Platform
from tests.conftest import needs_kubectl
from tests.manifests.test_overlay import SPECS, made, objects_of, spec_with

pytestmark = needs_kubectl

INSTANCE = "app.kubernetes.io/instance"
STRANGER = {"app": "theirs", "app.kubernetes.io/name": "theirs"}
NEIGHBOUR = {"app.kubernetes.io/name": "trireme", "app.kubernetes.io/component": "serving", INSTANCE: "other"}


def shared(name: str = "minilm", **kubernetes: Any) -> DeploymentSpec:
    spec = spec_with(kubernetes={"namespace": "shared", **kubernetes})
    return spec.model_copy(update={"name": name})


@pytest.mark.parametrize(
    ("keys", "made"),
    [
        ({}, True),
        ({"namespace": "shared"}, False),
        ({"namespace": "mine", "create_namespace": True}, True),
        ({"create_namespace": False}, False),
    ],
)
def test_a_namespace_that_is_named_is_not_made(keys: dict[str, Any], made: bool, tmp_path: Path) -> None:
    """Its labels hold for everything in it: with Pod Security restricted, other pods would be refused."""
    write_manifests(spec_with(kubernetes=keys), "cpu", tmp_path / "overlay")
    assert bool(list(objects_of(tmp_path / "overlay").of("Namespace"))) is made


@pytest.mark.parametrize("name", SPECS)
def test_selectors_leave_other_pods_alone(name: str) -> None:
    """Whatever selects pods for itself selects none of a stranger and none of another spec, and every pod of ours is
    cut off by the policy that denies."""
    objects = made(name)
    selectors = list(_selectors(objects))
    assert {title.partition("/")[0] for title, _ in selectors} >= {"Deployment", "Service", "NetworkPolicy"}
    for title, selector in selectors:
        assert not matches(selector, STRANGER), title
        assert not matches(selector, NEIGHBOUR), title
    denied = next(selector for title, selector in selectors if title.endswith("deny-by-default"))
    assert all(matches(denied, pod.labels) for pod in objects.pods())


def _selectors(objects: ObjectSet) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for item in objects.objects:
        if item.kind == "Service":
            yield item.title, {"matchLabels": at(item.data, "spec.selector")}
        elif item.kind == "NetworkPolicy":
            yield item.title, at(item.data, "spec.podSelector")
        elif item.kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
            yield item.title, at(item.data, "spec.selector")


def test_every_bucket_policy_reaches_the_job_that_builds() -> None:
    objects = made("a bucket of GCS")
    (bucket,) = (item for item in objects.of("NetworkPolicy") if item.name.endswith("bucket"))
    assert {pod.owner.kind for pod in objects.pods() if matches(at(bucket.data, "spec.podSelector"), pod.labels)} == {
        "Deployment",
        "Job",
    }


@pytest.mark.parametrize("kind", ["claim", "s3"])
def test_two_specs_in_one_namespace_share_no_name(kind: str, tmp_path: Path) -> None:
    """Neither an object of theirs, nor what a pod mounts that `deploy` and `load-version` make."""
    store = {"kind": kind} if kind == "claim" else {"kind": kind, "bucket": "b"}
    used: list[set[tuple[str, str]]] = []
    for name in ("first", "second"):
        write_manifests(shared(name, model_store=store), "cpu", tmp_path / name)
        objects = objects_of(tmp_path / name)
        used.append({(item.kind, item.name) for item in objects.objects} | set(_mounted(objects.pods())))
        used[-1] |= set(_dashboards(objects))
    assert not used[0] & used[1]
    assert ("Secret", "first-triton-control") in used[0]
    assert ("Secret", "first-api-keys") in used[0]
    assert ("ConfigMap", "second-model-version") in used[1]


def _dashboards(objects: ObjectSet) -> Iterator[tuple[str, str]]:
    """Grafana knows them by file, uid and title."""
    (held,) = (item for item in objects.of("ConfigMap") if item.labels.get("grafana_dashboard"))
    ((file, text),) = mapping(held.data, "data").items()
    found = json.loads(text)
    yield from (("file", file), ("uid", found["uid"]), ("title", found["title"]))


def _mounted(pods: Iterator[Pod]) -> Iterator[tuple[str, str]]:
    for pod in pods:
        for volume in pod.volumes().values():
            yield from (("ConfigMap", row["name"]) for row in [volume.get("configMap")] if row)
            yield from (("Secret", row["secretName"]) for row in [volume.get("secret")] if row)


def test_one_spec_in_two_namespaces_has_two_volumes(tmp_path: Path) -> None:
    """A PersistentVolume belongs to no namespace."""
    names = set()
    for namespace in ("one", "two"):
        spec = spec_with(kubernetes={"namespace": namespace, "model_store": {"kind": "s3", "bucket": "b"}})
        write_manifests(spec, "cpu", tmp_path / namespace)
        objects = objects_of(tmp_path / namespace)
        (volume,), (claim,) = objects.of("PersistentVolume"), objects.of("PersistentVolumeClaim")
        assert at(claim.data, "spec.volumeName") == volume.name
        names.add((volume.name, at(volume.data, "spec.csi.volumeHandle")))
    assert len({name for name, _ in names}) == len({handle for _, handle in names}) == 2


def test_alerts_are_about_this_deployment_only(tmp_path: Path) -> None:
    write_manifests(shared(), "gpu", tmp_path / "overlay")
    (rules,) = objects_of(tmp_path / "overlay").of("PrometheusRule")
    for rule in rows(rows(rules.data, "spec.groups")[0], "rules"):
        for part in str(rule["expr"]).split("{")[1:]:
            assert part.startswith('namespace="shared",'), rule
            assert 'pod=~"minilm-serving-[' in part or 'deployment="minilm-serving"' in part, rule
    text = str(rules.data)
    assert text.count("request_failure{") == text.count('reason!="CANCELED"}') > 0


def test_keys_for_clusters_of_other_people(tmp_path: Path) -> None:
    spec = shared(
        monitoring_labels={"release": "prometheus"},
        huggingface_token="hub",
        tolerations=[{"key": "team", "value": "search", "effect": "NoSchedule"}, {"key": "spot"}],
        gpu_node_labels={"sm89": {"cloud.google.com/gke-accelerator": "nvidia-l4"}},
    )
    write_manifests(spec, "gpu", tmp_path / "overlay")
    objects = objects_of(tmp_path / "overlay")
    for kind in ("PodMonitor", "PrometheusRule"):
        (item,) = objects.of(kind)
        assert item.labels["release"] == "prometheus"
        assert item.labels[INSTANCE] == "minilm"
    (deployment,) = (pod.spec for pod in objects.pods() if pod.owner.kind == "Deployment")
    (job,) = (pod.spec for pod in objects.pods() if pod.owner.kind == "Job")
    ours = [
        {"key": "team", "operator": "Equal", "value": "search", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    assert deployment["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        *ours,
    ]
    assert job["tolerations"] == ours
    affinity = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    terms = at(deployment, affinity)
    accelerator = {"key": "cloud.google.com/gke-accelerator", "operator": "In", "values": ["nvidia-l4"]}
    assert [term["matchExpressions"] for term in terms].count([accelerator]) == 1
    assert [row["name"] for row in job["containers"][0]["env"]] == ["HF_TOKEN", "HOME"]


def test_words_of_the_spec_stay_texts(tmp_path: Path) -> None:
    """Unquoted, kustomize and the API server would read numbers and yes or no in them."""
    words = ["y", "N", "on", "0o17", "017", "1e3", "1.5", "null", "2026-01-01", "1_000", "0x1f", "true"]
    spec = shared(
        monitoring_labels={f"l{index}": word for index, word in enumerate(words)},
        tolerations=[{"key": "k", "value": word, "effect": "NoSchedule"} for word in words],
    )
    write_manifests(spec, "cpu", tmp_path / "overlay")
    objects = objects_of(tmp_path / "overlay")
    (monitor,) = objects.of("PodMonitor")
    assert [monitor.labels[f"l{index}"] for index in range(len(words))] == words
    (deployment,) = (pod.spec for pod in objects.pods() if pod.owner.kind == "Deployment")
    assert [row["value"] for row in deployment["tolerations"] if row["key"] == "k"] == words


def test_every_job_of_several_has_the_token() -> None:
    slices: dict[str, Any] = {"kubernetes": {"huggingface_token": "hub", "tolerations": [{"key": "spot"}]}}
    slices["engine"] = {"flavour": "tensorrt", "targets": ["sm80", "sm90"]}
    files = overlay_files(spec_with(**slices), "gpu").files
    jobs = [text for name, text in files.items() if name.startswith("build/job")]
    assert len(jobs) == 2
    assert all("name: hub" in text and "key: spot" in text for text in jobs)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_what_the_server_holds(name: str) -> None:
    """Quantities as the server writes them; and every container names its limits, as a quota on them asks."""
    objects = made(name)
    for title, path, value in written_quantities(objects):
        assert value == canonical(value), (title, path)
    for pod in objects.pods():
        for path, container in pod.containers():
            assert {"cpu", "memory"} <= set(at(container, "resources.limits")), path


@pytest.mark.parametrize("name", SPECS)
def test_patches_hang_on_what_is_there(name: str) -> None:
    """kustomize passes over a patch whose target it does not find. (A claim may be what a patch takes away.)"""
    platform, slices = SPECS[name]
    held = [(item.kind, item.name.removeprefix("minilm-")) for item in made(name).objects]
    for kind, target in _targets(spec_with(**slices), platform):
        found = [name for held_kind, name in held if held_kind == kind and re.fullmatch(target, name)]
        assert found or kind == "PersistentVolumeClaim", (kind, target)


def _targets(spec: DeploymentSpec, platform: Platform) -> Iterator[tuple[str, str]]:
    for name, text in overlay_files(spec, platform).files.items():
        for row in (yaml.safe_load(text).get("patches") or []) if name.endswith("/kustomization.yaml") else []:
            yield row["target"]["kind"], row["target"]["name"]


@pytest.mark.parametrize(
    ("written", "held"),
    [
        ("1024Mi", "1Gi"), ("16640Mi", "16640Mi"), ("125000", "125k"), ("128", "128"), ("0.5", "500m"),
        ("1000m", "1"), (2, "2"), ("2e3", "2k"), ("0Gi", "0"), ("1.5Gi", "1536Mi"), ("100Ki", "100Ki"),
        ("0.1m", "100u"),
    ],
)  # fmt: skip
def test_canonical_quantities(written: object, held: str) -> None:
    assert canonical(written) == held
    assert canonical(held) == held
