"""The hand-written parts of k8s/: components, images, alerts and the dashboard agree with the code that they serve."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.manifests.lint.check import check_text
from builders.manifests.lint.schemas import checked_kinds
from builders.manifests.render import K8S, render
from runtime.generation.metrics import Gauges
from runtime.pod.__main__ import _parser
from tests.conftest import needs_kubectl

pytestmark = needs_kubectl

ROOT = K8S.parent
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
DOCKERFILES = sorted((K8S / "images").glob("*.Dockerfile"))
# What Triton's metrics port shows: docs of Triton, user_guide/metrics, checked against a running server in test_serve.
TRITON_METRICS = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_pending_request_count",
    "nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes",
}  # fmt: skip
# Of a language model: the fields of `Gauges`, as `runtime.generation.metrics` exports them.
OURS = {"trireme_model_info", *(f"trireme_generation_{field.name}" for field in fields(Gauges))}
# Of the gateway, on whose page the others stand too.
OURS |= {"trireme_gateway_requests_total", "trireme_gateway_request_seconds_bucket"}


def _used(folder: Path, key: str) -> list[str]:
    found: list[str] = []
    for file in folder.rglob("kustomization.yaml"):
        found += yaml.safe_load(file.read_text()).get(key, [])
    return found


def test_every_component_is_used_or_tried() -> None:
    """By an overlay, or in the test below: nothing lies here that was never rendered."""
    used = {Path(path).name for path in _used(K8S / "overlays", "components")} | {"dra", "locust"}
    assert used - {"eight-gpus"} == set(COMPONENTS)


def test_the_other_components_together_are_clean(tmp_path: Path) -> None:
    """With a name prefix, which has to reach every reference."""
    parts = ["dra", "locust", "networkpolicy", "disruption", "gateway-api", "autoscaling-keda", "monitoring", "images"]
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (tmp_path / "k8s").symlink_to(K8S)
    kustomization = {
        "namespace": "trireme",
        "namePrefix": "one-",
        "labels": [{"includeSelectors": True, "pairs": {"app.kubernetes.io/instance": "one"}}],
        "resources": ["../k8s/base"],
        "components": [f"../k8s/components/{name}" for name in parts],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    text = render(overlay)
    assert check_text(text, "x") == []
    environment = [row for item in _objects(text) for row in _find(item, "env")]
    assert {"one-serving", "one-locust-master"} <= {row.get("value") for rows in environment for row in rows}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_arguments_of_pods_are_those_of_the_program(overlay: str) -> None:
    for item in _objects(render(K8S / "overlays" / overlay)):
        for boxes in (*_find(item, "containers"), *_find(item, "initContainers")):
            for box in boxes:
                if "trireme/serving" in box["image"]:
                    words = [re.sub(r"\$\((\w+)\)", _value, word) for word in box["args"]]
                    _parser().parse_args(words)  # exits on an unknown argument


def _value(found: re.Match[str]) -> str:
    return {"MODEL": "m", "PLATFORM": "cpu", "GRAPH_DIGEST": "any", "LWS_GROUP_SIZE": "2"}.get(found.group(1), "1")


def test_tags_have_one_owner() -> None:
    owners = [file for file in K8S.rglob("*.yaml") if "newTag" in file.read_text()]
    assert owners == [K8S / "components" / "images" / "kustomization.yaml"]
    for overlay in OVERLAYS:
        assert set(re.findall(r"image: \S+:(\S+)", render(K8S / "overlays" / overlay))) == {"0.1.0"}


def test_alerts_and_panels_use_metrics_that_exist() -> None:
    folder = K8S / "components"
    rules = yaml.safe_load((folder / "monitoring" / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    dashboard = json.loads((folder / "monitoring" / "dashboard.json").read_text())
    adapter = yaml.safe_load((folder / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    keda = yaml.safe_load((folder / "autoscaling-keda" / "scaled-object.yaml").read_text())["spec"]["triggers"]
    queries = [rule["expr"] for rule in rules]
    queries += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [rule["seriesQuery"] + rule["metricsQuery"] for rule in adapter]
    queries += [trigger["metadata"]["query"] for trigger in keda]
    named = {name for query in queries for name in re.findall(r"\b(?:nv|trireme)_\w+", query)}
    assert named <= TRITON_METRICS | OURS
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 8


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_pinned_unprivileged_and_rehearsed(file: Path) -> None:
    """Each RUN is the step that rehearse.sh runs too; what is copied exists; nobody is root at the end."""
    lines = re.sub(r"\\\n", " ", file.read_text()).splitlines()
    steps = [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]
    bases = [step[1].partition("=")[2] for step in steps if step[0] == "ARG" and step[1].startswith("BASE=")]
    assert bases
    assert all(re.search(r":\d+\.\d+", base) for base in bases)
    assert [step[1] for step in steps if step[0] == "FROM"] == ["${BASE}", "${BASE}"]
    for step in steps:
        if step[0] == "RUN":
            assert "k8s/images/install.sh" in " ".join(step)
        if step[0] == "COPY" and not step[1].startswith("--from"):
            assert all((ROOT / source).exists() for source in step[1:-1])
    users = [step[1] for step in steps if step[0] == "USER"]
    assert users == ["10001:10001"]
    assert [step[0] for step in steps].count("HEALTHCHECK") == 1
    assert steps[-1][0] == "ENTRYPOINT"


def test_the_install_step_refuses_an_unknown_role(tmp_path: Path) -> None:
    command = [str(K8S / "images" / "install.sh"), "gateway", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "no role gateway" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_serving_image_installs_and_starts(tmp_path: Path) -> None:
    """The steps of serving.Dockerfile into a fresh environment, and its entry point without `builders`."""
    done = subprocess.run(
        [str(K8S / "images" / "rehearse.sh"), str(tmp_path)], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tritonserver" in done.stdout


def test_documents_name_the_checked_kinds() -> None:
    text = (K8S / "README.md").read_text()
    for kind in checked_kinds():
        assert kind.rpartition(" ")[2] in text


def _objects(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def _find(item: Any, key: str) -> list[Any]:
    """Values of a key, wherever it stands."""
    if isinstance(item, list):
        return [value for part in item for value in _find(part, key)]
    if isinstance(item, dict):
        return [value for name, part in item.items() for value in ([part] if name == key else _find(part, key))]
    return []
