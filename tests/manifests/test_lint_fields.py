"""Values that an API server refuses, field by field; and what it takes, and the checks must take too."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.manifests.lint.check import check_text, check_texts
from builders.manifests.lint.formats import is_schedule
from builders.manifests.lint.objects import read_objects

HERE = Path(__file__).parent
MISTAKES: list[tuple[str, dict[str, Any]]] = yaml.safe_load((HERE / "field_mistakes.yaml").read_text())
SHORT = {"@box": "@pod containers 0", "@pod": "spec template spec"}


@cache
def objects() -> dict[str, dict[str, Any]]:
    found, _ = read_objects((HERE / "field_objects.yaml").read_text(), "x")
    return {item.title: dict(item.data) for item in found}


def spoiled(title: str, puts: dict[str, Any]) -> dict[str, Any]:
    item = copy.deepcopy(objects()[title])
    for path, value in puts.items():
        for short, whole in SHORT.items():
            path = path.replace(short, whole)
        *way, last = (int(word) if word.isdigit() else word for word in path.split())
        place: Any = item
        for step in way:
            place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
        if value == "(gone)":
            del place[last]
        elif isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return item


def errors(text: str) -> list[str]:
    return [str(finding) for finding in check_text(text, "x.yaml") if finding.severity == "error"]


def test_the_objects_have_no_fault() -> None:
    assert check_text((HERE / "field_objects.yaml").read_text(), "x.yaml") == []
    assert not [title for title, item in objects().items() if errors(yaml.safe_dump(item))]


@pytest.mark.parametrize(
    ("title", "puts"),
    MISTAKES,
    ids=[f"{title}-{'-'.join(puts)}={next(iter(puts.values()))}"[:90] for title, puts in MISTAKES],
)
def test_each_value_that_the_server_refuses_is_an_error(title: str, puts: dict[str, Any]) -> None:
    assert errors(yaml.safe_dump(spoiled(title, puts)))


def test_what_is_too_long_is_an_error() -> None:
    for title, path in (("ConfigMap/settings", "data big"), ("Deployment/web", "metadata annotations big")):
        assert errors(yaml.safe_dump(spoiled(title, {path: "x" * 1_100_000})))


BOX = "{name: a, image: 'x:1'}"
POD = f"{{containers: [{BOX}]}}"
ACCEPTED = {
    "an account in the binding's own namespace": """
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: a}
roleRef: {apiGroup: "", kind: Role, name: a}
subjects: [{kind: ServiceAccount, name: robot}]""",
    "a route that redirects and has no parent yet": """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: a}
spec: {rules: [{matches: [{path: {type: PathPrefix}}]}]}""",
    "a gRPC route without parents": """
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: a}
spec: {rules: [{backendRefs: [{name: a, port: 1}]}]}""",
    "a protocol of an implementation's own": """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: a}
spec: {gatewayClassName: a, listeners: [{name: a, port: 1, protocol: example.org/QUIC}]}""",
    "claims of a group": """
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata: {name: a}
spec:
  networkConfig: {}
  rolloutStrategy: {rollingUpdateConfiguration: {maxSurge: 1}}
  leaderWorkerTemplate:
    volumeClaimTemplates:
      - {metadata: {name: data}, spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}}
    workerTemplate: {spec: {containers: [{name: a, image: "x:1", volumeMounts: [{name: data, mountPath: /d}]}]}}""",
    "a metric of a constant": """
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: a}
spec: {groups: [{name: a, rules: [{record: one, expr: 1}]}]}""",
    "no GPU at all": """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec: {containers: [{name: a, image: "x:1", resources: {limits: {nvidia.com/gpu: 0}}}]}""",
    "Jobs that the server names": f"""
apiVersion: v1
kind: List
items:
  - &job
    apiVersion: batch/v1
    kind: Job
    metadata: {{generateName: a-}}
    spec: {{template: {{spec: {{restartPolicy: Never, containers: [{BOX}]}}}}}}
  - *job""",
    "a list of one kind": """
apiVersion: v1
kind: ConfigMapList
items: [{metadata: {name: a}}, {metadata: {name: b}}]""",
    "a probe that is slower than its period": """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec: {containers: [{name: a, image: "x:1", livenessProbe: {tcpSocket: {port: 1}, timeoutSeconds: 30}}]}""",
    "ports of one name in two containers": """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec:
  containers:
    - {name: a, image: "x:1", ports: [{name: metrics, containerPort: 1}]}
    - {name: b, image: "x:1", ports: [{name: metrics, containerPort: 2}]}""",
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_what_the_server_takes_is_no_error(text: str) -> None:
    assert errors(text) == []


def rules(text: str) -> set[str]:
    return {finding.rule for finding in check_text(text, "x.yaml")}


def test_a_single_file_is_not_asked_for_the_others() -> None:
    """Pods, workloads and Services that it selects may be anywhere; a set that has some is asked which."""
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selector: {app: a}, ports: [{port: 1}]}\n"
    scaler = """apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: a}
spec: {scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: a}, maxReplicas: 2}
"""
    assert rules(service) | rules(scaler) == set()
    pod = f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p, labels: {{app: b}}}}\nspec: {POD}\n"
    assert "not-here" in rules(f"{service}---\n{pod}")


def test_a_limit_of_the_whole_pod_bounds_its_containers() -> None:
    bounded = POD.replace("{containers", "{resources: {limits: {memory: 1Gi}}, containers")
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: "
    assert "memory-limit" in rules(text + POD)
    assert "memory-limit" not in rules(text + bounded)
    assert "request-over-limit" in rules(text + bounded.replace("{limits", "{requests: {memory: 2Gi}, limits"))


def test_a_shell_takes_its_flags_in_any_order() -> None:
    text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, image: 'x:1', command: %s}]}"
    assert "variable" not in rules(text % '[/bin/bash, -ecx, "echo $(hostname)"]')
    assert "variable" in rules(text % '[echo, "$(hostname)"]')


def test_a_kind_that_kubernetes_does_not_have() -> None:
    """In its own groups nobody else defines kinds; in others somebody may."""
    text = "apiVersion: %s\nkind: Deploymnt\nmetadata: {name: a}\n"
    assert rules(text % "apps/v1") == {"unknown-kind"}
    assert rules(text % "apps.example.org/v1") == {"no-schema"}


def test_a_namesake_of_another_project_is_checked_by_its_own_schema_alone() -> None:
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"type": {"type": "string"}}}}}
    text = "apiVersion: serving.example.org/v1\nkind: Service\nmetadata: {name: a}\nspec: {type: Function}\n"
    given = {("serving.example.org/v1", "Service"): {**schema, "additionalProperties": True}}
    assert check_texts([("x.yaml", text)], given=given).findings == ()
    assert errors(text.replace("serving.example.org/v1", "v1"))
    (finding,) = check_texts([("x.yaml", text.replace("Function", "1"))], given=given).findings
    assert finding.rule == "schema"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 3 * * *", True), ("*/5 0-6 1,15 jan-mar mon", True), ("@daily", True), ("@every 1h30m", True),
        ("0 3 * *", False), ("60 * * * *", False), ("* * * * 7", False), ("5-1 * * * *", False), ("*/0 * * * *", False),
        ("@often", False), ("a b c d e", False),
    ],
)  # fmt: skip
def test_schedules(text: str, said: bool) -> None:
    assert is_schedule(text) is said
