"""Manifests from a spec: the arithmetic, the overlays, and what is refused."""

from __future__ import annotations

import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders.__main__ import run
from builders.commands.manifests import manifests
from builders.errors import CheckError, InputError, MachineError, SpecError
from builders.manifests.lint.check import ManifestFault
from builders.manifests.lint.objects import ObjectSet, at, read_objects
from builders.manifests.overlay import RENDERED, overlay_files, write_manifests
from builders.manifests.render import K8S, render
from builders.manifests.scaling import signals
from builders.manifests.sizing import STARTUP_PERIOD_S, size
from builders.spec import PRESETS, DeploymentSpec, Platform, load_spec
from tests.conftest import needs_kubectl
from tests.manifests.golden_manifests import CASES, KEPT, golden, written

pytestmark = needs_kubectl


def spec_with(**slices: dict[str, Any]) -> DeploymentSpec:
    """The preset, with keys of its slices laid over."""
    data = load_spec("minilm").model_dump(mode="json")
    for name, values in slices.items():
        data[name] = {**data[name], **values}
    return DeploymentSpec.model_validate(data)


def objects_of(folder: Path) -> ObjectSet:
    return ObjectSet(tuple(read_objects((folder / RENDERED).read_text(), RENDERED)[0]))


def pod_of(folder: Path) -> Any:
    (deployment,) = objects_of(folder).of("Deployment")
    return at(deployment.data, "spec.template.spec")


@pytest.mark.parametrize(("preset", "platform"), CASES, ids=lambda part: str(part))
def test_presets_give_the_committed_manifests(preset: str, platform: Platform, tmp_path: Path) -> None:
    made = written(preset, platform, tmp_path / "overlay")
    for name in KEPT:
        expected = (golden(preset, platform) / name).read_text()
        assert made[name] == expected, "run `make golden` if the change is meant"


def test_each_type_of_gpu_has_a_job_that_builds_on_it(tmp_path: Path) -> None:
    spec = load_spec("minilm-pp2")
    write_manifests(spec, "gpu", tmp_path / "overlay")
    built = {}
    for job in objects_of(tmp_path / "overlay").of("Job"):
        pod = at(job.data, "spec.template.spec")
        (terms,) = at(pod, "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms")
        major, minor = (row["values"][0] for row in terms["matchExpressions"])
        (box,) = pod["containers"]
        assert box["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert f"--target=sm{major}{minor}" in box["args"]
        built[f"sm{major}{minor}"] = job.name
    assert set(built) == set(spec.engine.targets)


def test_the_component_builds_the_preset() -> None:
    assert (K8S / "components" / "engine-build" / "spec.yaml").read_text() == (PRESETS / "minilm.yaml").read_text()


SPECS: dict[str, tuple[Platform, dict[str, Any]]] = {
    "keda, no spare GPUs, a gateway, a cache": (
        "gpu",
        {"kubernetes": {
            "scaling": {"by": "keda"}, "surge": False, "model_store": {"cache_gib": 20},
            "gateway": {"class_name": "external", "hostname": "models.example.com"},
        }},
    ),
    "DRA, two ranks": (
        "gpu",
        {"kubernetes": {"gpus_by": "dra"}, "parallel": {"tensor": 2}, "serving": {"executor": "onnxruntime"},
         "engine": {"flavour": "tensorrt", "targets": ["sm90"]}, "precision": {"cpu": "fp32"}},
    ),
    "keys and a certificate of others, vLLM's names, spans": (
        "cpu",
        {"kubernetes": {"access": {
            "api_keys_secret": "team", "tls_secret": "models-tls", "vllm_metrics": True,
            "otlp_endpoint": "http://collector.watching.svc:4318",
        }}},
    ),
    "open to whoever reaches it": ("cpu", {"kubernetes": {"access": {"no_auth": True}}}),
    "HTTP from outside too": (
        "cpu",
        {"kubernetes": {"gateway": {
            "class_name": "external", "hostname": "grpc.example.com", "http_hostname": "models.example.com",
        }}},
    ),
    "a MIG slice": ("gpu", {"kubernetes": {"gpu_resource": "nvidia.com/mig-1g.10gb"}}),
    "a bucket of GCS": ("gpu", {"kubernetes": {"model_store": {"kind": "gcs", "bucket": "b", "identity": "a@b.iam"}}}),
    "a bucket of S3": ("cpu", {"kubernetes": {"model_store": {"kind": "s3", "bucket": "b", "identity": "arn:aws:x"}}}),
    "no operator in the cluster": ("cpu", {"kubernetes": {"monitoring": False, "scaling": {"by": "none"}}}),
    "built elsewhere": ("cpu", {"kubernetes": {"build_in_cluster": False, "model_store": {"access": "ReadOnlyMany"}}}),
    "everything said": (
        "cpu",
        {"kubernetes": {
            "namespace": "search", "cpus": 6, "memory_gib": 10, "shm_mib": 512, "load_s": 42, "drain_s": 60,
            "pre_stop_s": 20, "priority_class": "serving", "node_selector": {"pool": "models"},
            "images": {"registry": "registry.example.com/team", "tag": "1.2.3", "pull_secret": "pull"},
        }},
    ),
}  # fmt: skip


@cache
def made(name: str) -> ObjectSet:
    """The objects of one of SPECS, written and checked once for all tests."""
    platform, slices = SPECS[name]
    with tempfile.TemporaryDirectory() as folder:
        done = write_manifests(spec_with(**slices), platform, Path(folder) / "overlay")
        objects = objects_of(Path(folder) / "overlay")
    assert done.objects == len(objects.objects)
    return objects


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_deployment_passes_the_checks(name: str) -> None:
    assert made(name).objects


def test_ranks_become_gpus_of_one_pod(tmp_path: Path) -> None:
    write_manifests(load_spec("minilm-tp2"), "gpu", tmp_path / "overlay")
    pod = pod_of(tmp_path / "overlay")
    for box in (*pod["initContainers"], *pod["containers"]):
        assert box["resources"]["limits"]["nvidia.com/gpu"] == box["resources"]["requests"]["nvidia.com/gpu"] == "2"


def test_what_the_spec_says_stands_in_the_pod(tmp_path: Path) -> None:
    platform, slices = SPECS["everything said"]
    write_manifests(spec_with(**slices), platform, tmp_path / "overlay")
    pod = pod_of(tmp_path / "overlay")
    (triton,) = pod["containers"]
    assert triton["image"] == "registry.example.com/team/trireme/serving:1.2.3"
    assert triton["resources"]["limits"] == {"cpu": "6", "memory": "11Gi"}  # 10 and a half, and the gateway's
    assert triton["startupProbe"]["failureThreshold"] * STARTUP_PERIOD_S >= 42
    assert pod["terminationGracePeriodSeconds"] >= 20 + 60
    assert pod["priorityClassName"] == "serving"
    assert pod["nodeSelector"] == {"pool": "models"}
    assert {item.namespace for item in objects_of(tmp_path / "overlay").objects} == {"search"}, (
        "and no Namespace itself"
    )


def _pod_of(objects: ObjectSet) -> dict[str, Any]:
    (deployment,) = objects.of("Deployment")
    pod: dict[str, Any] = deployment.data["spec"]["template"]["spec"]
    return pod


def test_pods_ask_for_keys_by_default() -> None:
    """Of a Secret that `trireme deploy` makes; hashes alone are mounted, and Prometheus has a key of its own."""
    objects = made("a bucket of S3")
    pod, (monitor,) = _pod_of(objects), objects.of("PodMonitor")
    (box,) = pod["containers"]
    assert "--api-keys-file=/etc/trireme/keys/keys" in box["args"]
    (keys,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys")
    assert keys == {"secretName": "minilm-api-keys", "items": [{"key": "keys", "path": "keys"}]}
    (endpoint,) = monitor.data["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "minilm-api-keys", "key": "monitor"}}
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_the_gateway_is_all_that_a_pod_shows() -> None:
    objects = made("a bucket of S3")
    (box,) = _pod_of(objects)["containers"]
    assert not [word for word in box["args"] if word.startswith(("--http-address", "--grpc-address", "--metrics-add"))]
    assert {row["containerPort"] for row in box["ports"]} == {8080, 8081, 8003}
    for service in objects.of("Service"):
        assert {row["port"] for row in service.data["spec"]["ports"]} == {8080, 8081}
    opened = [
        row["port"] for policy in objects.of("NetworkPolicy") for rule in policy.data["spec"].get("ingress", ())
        for row in rule.get("ports", ())
    ]  # fmt: skip
    assert sorted(opened) == ["grpc", "http"]
    assert box["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_keys_and_a_certificate_are_secrets_by_name() -> None:
    objects = made("keys and a certificate of others, vLLM's names, spans")
    pod, (monitor,) = _pod_of(objects), objects.of("PodMonitor")
    (box,) = pod["containers"]
    assert {"--tls-cert=/etc/trireme/tls/tls.crt", "--tls-key=/etc/trireme/tls/tls.key"} < set(box["args"])
    assert {"--vllm-metrics", "--otlp-endpoint=http://collector.watching.svc:4318"} < set(box["args"])
    (policy,) = (
        one.data["spec"] for one in objects.of("NetworkPolicy") if one.data["metadata"]["name"] == "minilm-serving"
    )
    (rule,) = policy["egress"]  # the one connection that the pods start
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert rule["ports"] == [{"protocol": "TCP", "port": 4318}]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "watching"}}}]
    named = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert named == {"keys": "team", "tls": "models-tls", "control": "minilm-triton-control"}
    assert {row["name"] for row in box["volumeMounts"]} >= {"keys", "tls"}
    for probe in ("startupProbe", "readinessProbe"):
        assert box[probe]["httpGet"]["scheme"] == "HTTPS"
    (endpoint,) = monitor.data["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["authorization"]["credentials"]["name"] == "team"
    for service in objects.of("Service"):
        assert [row.get("appProtocol") for row in service.data["spec"]["ports"]] == ["https", None]


def test_without_keys_nothing_of_them_is_left() -> None:
    objects = made("open to whoever reaches it")
    pod, (monitor,) = _pod_of(objects), objects.of("PodMonitor")
    (box,) = pod["containers"]
    assert "--no-auth" in box["args"]
    assert not [word for word in box["args"] if "keys" in word]
    assert "keys" not in {row["name"] for row in (*box["volumeMounts"], *pod["volumes"])}
    assert "authorization" not in monitor.data["spec"]["podMetricsEndpoints"][0]


def test_routes_from_outside_lead_to_the_gateway() -> None:
    objects = made("HTTP from outside too")
    routes = {item.kind: item.data["spec"] for item in objects.of("GRPCRoute", "HTTPRoute")}
    hosts = {kind: (spec["hostnames"], spec["parentRefs"][0]["sectionName"]) for kind, spec in routes.items()}
    assert hosts == {"GRPCRoute": (["grpc.example.com"], "grpc"), "HTTPRoute": (["models.example.com"], "http")}
    backends = {kind: spec["rules"][0]["backendRefs"][0] for kind, spec in routes.items()}
    assert {kind: (one["name"], one["port"]) for kind, one in backends.items()} == {
        "GRPCRoute": ("minilm-serving", 8081), "HTTPRoute": ("minilm-serving", 8080),
    }  # fmt: skip


def test_an_overlay_stands_alone_and_is_written_again(tmp_path: Path) -> None:
    first = tmp_path / "overlay"
    write_manifests(load_spec("minilm"), "cpu", first)
    moved = shutil.move(first, tmp_path / "elsewhere")
    assert (moved / RENDERED).read_text().endswith(render(moved))
    write_manifests(load_spec("minilm"), "gpu", moved)
    assert "nvidia.com/gpu" in (moved / RENDERED).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere"]


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        write_manifests(load_spec("minilm"), "cpu", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_write_keeps_the_earlier_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "overlay"
    write_manifests(load_spec("minilm"), "cpu", folder)
    before = (folder / RENDERED).read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="kubectl: got not on PATH"):
        write_manifests(load_spec("minilm"), "gpu", folder)
    assert (folder / RENDERED).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["overlay"]


def test_our_own_checks_guard_the_output(tmp_path: Path) -> None:
    """Replicas on several nodes cannot share a volume of one node: refused, and nothing is left."""
    with pytest.raises(ManifestFault, match="ReadWriteOnce for several replicas") as refused:
        write_manifests(spec_with(kubernetes={"model_store": {"access": "ReadWriteOnce"}}), "cpu", tmp_path / "overlay")
    assert refused.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_kustomize_says_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    with pytest.raises(CheckError, match=r"gone\.yaml"):
        render(tmp_path)


@pytest.mark.parametrize(
    ("slices", "error", "said"),
    [
        ({"slo": {"p95_latency_ms": 0.5}}, SpecError, "queue_delay_us"),
        ({"precision": {"calibration_texts": "/tmp/texts"}}, SpecError, "a pod in the cluster can read"),
        ({"model": {"source": "/tmp"}}, SpecError, "a pod in the cluster can read"),
    ],
)
def test_what_cannot_be_deployed_is_refused(slices: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        overlay_files(spec_with(**slices), "gpu")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"replicas": 2}, "replicas"),
        ({"images": {"tag": "latest"}}, "latest"),
        ({"scaling": {"min_replicas": 9}}, "over max_replicas"),
        ({"model_store": {"kind": "gcs"}}, "needs bucket"),
        ({"model_store": {"bucket": "b"}}, "takes no bucket"),
        ({"model_store": {"identity": "b"}}, "is for gcs and s3"),
        ({"graph_digest": "abc"}, "pattern"),
        ({"access": {"keys": "team"}}, "access.keys"),
        ({"access": {"no_auth": True, "api_keys_secret": "team"}}, "leave one of them out"),
        ({"access": {"tls_secret": "t"}, "gateway": {"class_name": "c", "hostname": "h"}}, "ends TLS"),
        ({"gateway": {"class_name": "c", "hostname": "h", "http_hostname": "h"}}, "two names"),
    ],
)
def test_bad_keys_of_the_slice_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec_with(kubernetes=keys)


@given(
    p95_ms=st.floats(2, 60_000),
    rate=st.none() | st.floats(0.1, 100_000),
    share=st.floats(0.01, 0.99),
    replicas=st.integers(1, 50),
    batch=st.integers(1, 64),
)
def test_thresholds_follow_the_promise(
    p95_ms: float, rate: float | None, share: float, replicas: int, batch: int
) -> None:
    """A pod that shows its threshold still answers within the promise: what waits, at its rate, waits no longer."""
    spec = spec_with(
        slo={"p95_latency_ms": p95_ms, "min_throughput_per_s": rate},
        serving={"max_batch_size": batch},
        kubernetes={"scaling": {"queue_share": share, "min_replicas": replicas, "max_replicas": 50}},
    )
    sizing = size(spec, "cpu")
    delay_us = spec.serving.queue_delay_us
    assert 1 <= sizing.pending_requests <= spec.serving.queue_size
    assert sizing.queue_us == max(int(1000 * p95_ms * share), 2 * delay_us)
    if rate is not None:
        assert sizing.pending_requests <= max(1, math.ceil(rate / replicas * sizing.queue_us / 1e6))


@given(
    load_s=st.integers(1, 10_000),
    fetch_s=st.integers(1, 10_000),
    drain_s=st.integers(1, 600),
    pre_stop_s=st.integers(1, 120),
)
def test_times_leave_room_for_each_other(load_s: int, fetch_s: int, drain_s: int, pre_stop_s: int) -> None:
    times = {"load_s": load_s, "fetch_s": fetch_s, "drain_s": drain_s, "pre_stop_s": pre_stop_s}
    sizing = size(spec_with(kubernetes=times), "cpu")
    assert load_s <= sizing.startup_failures * STARTUP_PERIOD_S < load_s + STARTUP_PERIOD_S
    assert sizing.grace_s > pre_stop_s + drain_s
    assert sizing.progress_deadline_s > load_s + fetch_s


def test_metrics_of_the_autoscaler_are_those_that_the_adapter_makes() -> None:
    """Generation waits for slots and cache, not in Triton's queues."""
    rules = yaml.safe_load((K8S / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml").read_text())
    made = {rule["name"]["as"] for rule in rules["rules"]["custom"]}
    spec = load_spec("minilm")
    generating = spec.model_copy(update={"model": spec.model.model_copy(update={"task": "generation"})})
    assert generating.generates
    first, second = (set(signals(task, size(task, "cpu"))) for task in (spec, generating))
    assert first | second == made
    assert not first & second


def test_a_spec_becomes_manifests_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda: manifests("minilm", tmp_path / "overlay"))
    said = capsys.readouterr().out
    assert "objects in namespace minilm" in said
    assert f"kubectl apply --server-side -k {tmp_path / 'overlay'}" in said
