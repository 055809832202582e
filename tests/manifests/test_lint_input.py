"""What the checks take and how they answer: every kind of input, comments, given CRDs, YAML's words, SARIF."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.__main__ import run
from builders.commands.manifests import lint_manifests
from builders.errors import InputError
from builders.manifests.lint.check import check_text, check_texts
from builders.manifests.lint.definitions import definitions
from builders.manifests.lint.objects import read_objects
from builders.manifests.lint.severities import SEVERITIES
from builders.manifests.overlay import write_manifests
from builders.spec import load_spec
from tests.cluster.fake_api import serving, write_kubeconfig
from tests.cluster.fake_cluster import FakeCluster
from tests.conftest import needs_kubectl

BAD_SERVICE = """apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: clusterIP
  ports: [{port: 80}]
"""


def rules(text: str) -> set[str]:
    return {finding.rule for finding in check_text(text, "x.yaml")}


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(BAD_SERVICE))
    with pytest.raises(SystemExit):
        run(lambda: lint_manifests([Path("-")]))
    assert "error: Service/web spec.type: value: got clusterIP" in capsys.readouterr().out


@needs_kubectl
def test_a_folder_of_kustomize_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder that `trireme manifests` writes is one."""
    write_manifests(load_spec("minilm"), "cpu", tmp_path / "overlay")
    run(lambda: lint_manifests([tmp_path / "overlay"]))
    assert "nothing found" in capsys.readouterr().out


def test_a_rule_is_left_out_by_name(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(BAD_SERVICE)
    run(lambda: lint_manifests([file], ignore=["value"]))
    with pytest.raises(InputError, match="expected a rule: autoscaled-replicas, autoscaler"):
        lint_manifests([file], ignore=["values"])


def test_a_comment_switches_a_rule_off_for_its_document() -> None:
    second = BAD_SERVICE.replace("web", "other")
    text = f"{BAD_SERVICE}# lint-manifests: ignore value, token\n---\n{second}"
    assert [item.object for item in check_text(text, "x.yaml")] == ["Service/other"]
    text = f"{BAD_SERVICE}---\n# lint-manifests: ignore value\n{second}"
    assert [item.object for item in check_text(text, "x.yaml")] == ["Service/web"]
    assert "ignore-comment" in rules(f"# lint-manifests: ignore valu\n{BAD_SERVICE}")


def test_sarif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\n---\n{BAD_SERVICE}")
    with pytest.raises(SystemExit):
        run(lambda: lint_manifests([file], as_sarif=True))
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    (result,) = found["results"]
    assert (result["ruleId"], result["level"]) == ("value", "error")
    (place,) = result["locations"]
    assert place["physicalLocation"] == {"artifactLocation": {"uri": str(file)}, "region": {"startLine": 5}}
    assert found["tool"]["driver"]["rules"] == [{"id": "value", "defaultConfiguration": {"level": "error"}}]


def test_one_fault_does_not_hide_the_next() -> None:
    """What the schema refuses is taken away, and the rest is checked; what follows from that is not told."""
    text = """apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replica: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      restartPolicy: sometimes
      containers:
        - {name: web, image: "web:latest", resources: {limits: {memory: [1]}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: store}
spec: {accessModes: [ReadWriteOnce], resources: {}}
"""
    found = check_text(text, "x.yaml")
    assert {"schema", "image-tag", "value"} <= {item.rule for item in found}
    assert "memory-limit" not in {item.rule for item in found}
    assert {item.object for item in found if item.rule == "value"} == {"Deployment/web", "PersistentVolumeClaim/store"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("y", True), ("No", False), ("on", True), ("0o17", 15), ("017", 15), ("1e3", 1000.0), ("8080:80", "8080:80"),
        ("2026-01-01", "2026-01-01"), ("'y'", "y"), ("yesterday", "yesterday"), ("1_000", 1000), ("~", None),
    ],
)  # fmt: skip
def test_words_are_read_as_kubectl_reads_them(written: str, read: object) -> None:
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\ndata:\n  key: {written}\n"
    (item,), _ = read_objects(text, "x.yaml")
    assert item.data["data"]["key"] == read
    assert ("schema" in rules(text)) is not isinstance(read, str | None)


CRD: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "shapes.example.org"},
    "spec": {
        "group": "example.org",
        "scope": "Namespaced",
        "names": {"kind": "Shape", "plural": "shapes"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "required": ["corners"],
                                "properties": {
                                    "corners": {"type": "integer", "minimum": 3},
                                    "size": {"x-kubernetes-int-or-string": True},
                                    "colours": {"type": "object", "additionalProperties": {"type": "string"}},
                                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                                    "name": {"type": "string", "nullable": True},
                                },
                            }
                        },
                    }
                },
            }
        ],
    },
}


@pytest.mark.parametrize(
    ("spec", "refused"),
    [
        ({"corners": 4, "size": "50%", "colours": {"a": "red"}, "free": {"x": [1]}, "name": None}, False),
        ({"corners": 4, "size": 3}, False),
        ({"corners": 2}, True),
        ({"corner": 4, "corners": 4}, True),
        ({}, True),
        ({"corners": 4, "size": [1]}, True),
        ({"corners": 4, "colours": {"a": 1}}, True),
    ],
)
def test_given_definitions_are_checked_against(spec: dict[str, Any], refused: bool) -> None:
    given = definitions(read_objects(yaml.safe_dump(CRD), "crd.yaml")[0])
    shape = {"apiVersion": "example.org/v1", "kind": "Shape", "metadata": {"name": "round"}, "spec": spec}
    found = check_texts([("x.yaml", yaml.safe_dump(shape))], given=given).findings
    assert [item.rule for item in found] == (["schema"] if refused else [])
    assert "no-schema" in rules(yaml.safe_dump(shape))


def test_definitions_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "shapes.yaml").write_text(yaml.safe_dump(CRD))
    shape = {"apiVersion": "example.org/v1", "kind": "Shape", "metadata": {"name": "round"}, "spec": {"corners": 3}}
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(shape))
    run(lambda: lint_manifests([tmp_path / "shape.yaml"], crd=[tmp_path / "crds"]))
    assert "1 objects: nothing found" in capsys.readouterr().out


def test_definitions_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCluster()
    fake.store(("apiextensions.k8s.io/v1", "customresourcedefinitions", None, "shapes.example.org"), CRD)
    shape = {"apiVersion": "example.org/v1", "kind": "Shape", "metadata": {"name": "round"}, "spec": {"corners": 2}}
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(shape))
    with serving(fake) as url:
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", url)))
        monkeypatch.setattr("kubernetes.config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        with pytest.raises(SystemExit):
            run(lambda: lint_manifests([tmp_path / "shape.yaml"], from_cluster=True))
    assert "Shape/round spec.corners: schema: got 2 is less than the minimum of 3" in capsys.readouterr().out


GROUP = """apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata: {name: vllm}
spec:
  replicas: 1
  leaderWorkerTemplate:
    size: 2
    workerTemplate:
      metadata: {labels: {role: worker}}
      spec:
        automountServiceAccountToken: false
        containers:
          - name: vllm
            image: vllm:1.0
            command: [sh, -c, "echo $(date)"]
            ports: [{containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: vllm}
spec:
  ports: [{port: 80, targetPort: 9999}]
  selector: {leaderworkerset.sigs.k8s.io/name: vllm, role: worker}
"""


def test_what_the_server_accepts_is_no_fault() -> None:
    """Labels that a controller sets, numbers of ports that no list names, the shell's own `$(…)`."""
    assert not rules(GROUP) & {"selector", "port", "variable", "value", "schema"}


def test_every_rule_has_a_severity() -> None:
    """`Finding.severity` looks it up, so a rule without one is a crash at its first finding."""
    folder = Path(__file__).parents[2] / "builders" / "manifests" / "lint"
    text = "".join(file.read_text() for file in folder.glob("*.py"))
    named = set(re.findall(r'(?:Finding\(\s*|rule=)"([a-z-]+)"', text))
    assert named == set(SEVERITIES)
