"""A model version on running pods: one at a time, at the pace of budget and readiness, stopped by the first failure."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cluster.api import Cluster
from cluster.apply import apply
from cluster.control import control_secret, ensure_secrets
from cluster.deploy import deploy
from cluster.errors import ClusterError, RolloutError
from cluster.load_version import (
    LoadPace,
    PodPorts,
    allows,
    load_version,
    settle_s,
)
from cluster.observe import observe
from runtime.model_control import CONTROL_HEADER
from runtime.pod.control import Control, HealthServer
from runtime.pod.layout import Layout, lay_out
from runtime.pod.model_store import PUBLISHED, Publication, PublishedFile
from runtime.pod.node import Node
from runtime.pod.versions import Versions
from runtime.server.health import Health
from runtime.settings import FILE_NAME, ServerSettings
from tests.cluster.deploy_objects import CONFIG_MAPS, PATIENCE, SERVER, connected, deployment, silent
from tests.cluster.fake_cluster import FakeCluster

SECRET = "open-sesame"
PACE = LoadPace(load_s=20, ready_s=0.5, pause_s=0.02)
VERSION = 2


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The repository control of one pod: real gRPC, and Triton's own rules of what a load answers."""

    def __init__(self, versions: Versions) -> None:
        self.versions = versions  # of the launcher beside it, which probes
        self.loaded: list[str] = []
        self.broken = self.missing = self.useless = False
        self.reason = ""  # why the launcher gives a useless version up
        self.on_load: Any = None
        self.still_there: Callable[[], bool] = lambda: True

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        if dict(context.invocation_metadata()).get(CONTROL_HEADER) != SECRET:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header")
        if self.broken:
            context.abort(grpc.StatusCode.INTERNAL, "failed to load 'part', no version is available")
        self.loaded.append(request.model_name)
        if self.on_load:
            self.on_load()
        if request.model_name == "ensemble" and self.useless:
            self.versions.discard(self.reason)
        elif request.model_name == "ensemble" and not self.missing:
            self.versions.answered(VERSION)
        return service_pb2.RepositoryModelLoadResponse()

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        ready = request.version == "2" and not self.missing and request.name in self.loaded and self.still_there()
        return service_pb2.ModelReadyResponse(ready=ready)


@pytest.fixture
def cluster(fake: FakeCluster, tmp_path: Path) -> Iterator[Cluster]:
    with connected(fake, tmp_path) as found:
        deploy(found, "demo", [deployment(replicas=3)], PATIENCE, silent)
        yield found


def _launcher(store: Path, into: Path) -> Control:
    """The launcher's own control, over a store of two versions that consist of the server's settings alone."""
    models = ("part", "ensemble")
    for version in (1, 2):
        settings = ServerSettings(
            ensemble="ensemble", models=models, version=version, response_cache_bytes=0, rate_limited=False,
            content_digest=f"{version}" * 64, proof_digest="p",
        )  # fmt: skip
        text = settings.model_dump_json()
        file = PublishedFile(name=FILE_NAME, bytes=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())
        item = Publication(
            model="ensemble", models=models, platform="cpu", version=version,
            content_digest=settings.content_digest, published_ns=version, engines=(), files=(file,),
        )  # fmt: skip
        (item.folder(store) / "repository").mkdir(parents=True, exist_ok=True)
        (item.folder(store) / "repository" / FILE_NAME).write_text(text)
        (item.folder(store) / PUBLISHED).write_text(item.model_dump_json())
        if version == 1:
            lay_out(item, Layout(store, into))
    versions = Versions("ensemble", "cpu", Node({}, None), "any", Layout(store, into), lambda _: None)
    versions.restore()
    return Control(SECRET, versions)


def _start(stack: contextlib.ExitStack, fake: FakeCluster, name: str, folder: Path) -> Triton:
    """Both ports of one pod."""
    control = _launcher(folder / "store", folder / name)
    triton, server = Triton(control.versions), grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    fake.addresses[name, PodPorts().grpc] = ("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    server.start()
    stack.callback(lambda: server.stop(0).wait())
    health = stack.enter_context(HealthServer(Health(), "127.0.0.1", 0, control))
    fake.addresses[name, PodPorts().health] = ("127.0.0.1", health.port)
    return triton


@pytest.fixture
def pods(fake: FakeCluster, cluster: Cluster, tmp_path: Path) -> Iterator[dict[str, Triton]]:
    """A server for each pod, by the pod's name."""
    with contextlib.ExitStack() as stack:
        names = [pod["metadata"]["name"] for pod in observe(cluster, SERVER).pods]
        yield {name: _start(stack, fake, name, tmp_path) for name in names}


def test_one_pod_after_another(cluster: Cluster, pods: dict[str, Triton]) -> None:
    told: list[str] = []
    assert load_version(cluster, SERVER, VERSION, SECRET, pace=PACE, report=told.append) == list(pods)
    assert [server.loaded for server in pods.values()] == [["part", "ensemble"]] * 3
    assert told == [line for pod in pods for line in (f"{pod}: loading version 2", f"{pod}: serves version 2")]
    written = cluster.get(CONFIG_MAPS, "prod", "model-version")
    assert written is not None
    assert written["data"] == {"version": "2"}, "for pods to come"


def test_a_pod_that_comes_meanwhile_gets_it_too(
    cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster, tmp_path: Path
) -> None:
    """It began with the version of before, because that was still the one that was written down."""
    last = list(pods)[-1]
    with contextlib.ExitStack() as stack:

        def scale_up() -> None:
            fake.objects["apps/v1", "deployments", "prod", "server"]["spec"]["replicas"] = 4
            while not (new := {key[3] for key, _ in fake.find("v1", "pods")} - set(pods)):
                pass
            (name,) = new
            pods[name] = _start(stack, fake, name, tmp_path)
            pods[last].on_load = None

        pods[last].on_load = scale_up
        assert load_version(cluster, SERVER, VERSION, SECRET, pace=dataclasses.replace(PACE, ready_s=20)) == list(pods)
        assert len(pods) == 4


def test_without_the_right_to_write_it_down_nothing_is_touched(
    cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster
) -> None:
    fake.denied.add(("patch", "configmaps"))
    with pytest.raises(ClusterError, match="no right to patch configmaps"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
    assert not any(server.loaded for server in pods.values())


def test_a_version_that_fails_stops_at_its_first_pod(cluster: Cluster, pods: dict[str, Triton]) -> None:
    first, second, third = pods
    pods[second].broken = True
    expected = (
        rf"{second}: Triton: failed to load 'part'.*Version 2 is in 1 of 3 pods \({first}\); "
        rf"{second}, {third} keep what they served\. Fix:"
    )
    with pytest.raises(RolloutError, match=expected):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
    assert pods[third].loaded == []


def test_a_version_that_is_not_there_after_the_load(cluster: Cluster, pods: dict[str, Triton]) -> None:
    next(iter(pods.values())).missing = True
    with pytest.raises(RolloutError, match="part has no version 2 after the load; it serves version 1"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)


def test_a_pod_that_is_not_ready_after_the_load(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    first, second, _ = pods
    pods[first].on_load = lambda: fake.images.update(good="slow")
    with pytest.raises(
        RolloutError, match=rf"{first}: it is not ready again within .*Version 2 is in 0 of 3 pods \(none\)"
    ):
        load_version(cluster, SERVER, VERSION, SECRET, pace=dataclasses.replace(PACE, ready_s=0.3))
    assert pods[second].loaded == []


def test_a_version_that_loads_and_cannot_infer(cluster: Cluster, pods: dict[str, Triton]) -> None:
    first, second, _ = pods
    pods[first].useless = True
    with pytest.raises(RolloutError, match=rf"{first}: its launcher has gone back to version 1: inferences failed"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
    assert pods[second].loaded == []


def test_a_version_that_is_not_proven_in_a_pod(cluster: Cluster, pods: dict[str, Triton]) -> None:
    first, second, _ = pods
    pods[first].useless, pods[first].reason = True, "ensemble version 2 is not proven on this machine: mean cosine 0.9"
    with pytest.raises(RolloutError, match=rf"{first}: its launcher has gone back to version 1: {pods[first].reason}"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
    assert pods[second].loaded == []


def test_a_server_that_dies_of_the_load(cluster: Cluster, pods: dict[str, Triton]) -> None:
    """The kubelet restarts it, and it is ready again: without the version."""
    first = next(iter(pods))
    answers = iter([True, True, False])  # both models right after the load, then none
    pods[first].still_there = lambda: next(answers, False)
    with pytest.raises(RolloutError, match=rf"{first}: part has no version 2 after the load"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)


def test_a_pod_that_goes_meanwhile(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    first, second, third = pods

    def scale_down() -> None:
        fake.objects["apps/v1", "deployments", "prod", "server"]["spec"]["replicas"] = 2
        if ("v1", "pods", "prod", third) in fake.objects:
            fake.remove(("v1", "pods", "prod", third))

    pods[first].on_load = scale_down
    assert load_version(cluster, SERVER, VERSION, SECRET, pace=PACE) == [first, second]


def test_never_below_the_disruption_budget(cluster: Cluster, pods: dict[str, Triton]) -> None:
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "server"},
        "spec": {"minAvailable": 3, "selector": {"matchLabels": {"app": "server"}}},
    }
    list(apply(cluster, [budget]))
    with pytest.raises(RolloutError, match="its disruption budget does not allow to do without it"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
    assert not any(server.loaded for server in pods.values())
    budget["spec"] = {"minAvailable": 2, "selector": {"matchLabels": {"app": "server"}}}
    list(apply(cluster, [budget]))
    assert len(load_version(cluster, SERVER, VERSION, SECRET, pace=dataclasses.replace(PACE, ready_s=20))) == 3


def test_budget_arithmetic() -> None:
    def budget(allowed: int, observed: int = 1) -> dict[str, Any]:
        status = {"disruptionsAllowed": allowed, "observedGeneration": observed}
        return {"metadata": {"generation": 1}, "status": status}

    assert allows(budget(1), pod_ready=True)
    assert not allows(budget(0), pod_ready=True)
    assert allows(budget(0), pod_ready=False), "a pod that is missing already is not missed twice"
    assert not allows(budget(1, observed=0), pod_ready=True), "figures of the budget before"


def test_how_long_a_probe_may_take_to_notice() -> None:
    def pod(*probes: dict[str, int] | None) -> dict[str, Any]:
        return {"spec": {"containers": [{"readinessProbe": probe} if probe else {} for probe in probes]}}

    assert settle_s(pod({"periodSeconds": 5, "failureThreshold": 2}, {"periodSeconds": 1})) == 10
    assert settle_s(pod({"timeoutSeconds": 1})) == 30, "the kubelet's defaults"
    assert settle_s(pod(None)) == 0


def test_the_secret_of_the_pods(cluster: Cluster, fake: FakeCluster) -> None:
    with pytest.raises(ClusterError, match=r"Secret prod/triton-control: got no such Secret.*--control-secret"):
        control_secret(cluster)
    pods = deployment()
    assert ensure_secrets(cluster, [pods]) == [], "nothing in this set mounts it"
    pods["spec"]["template"]["spec"]["volumes"] = [{"name": "control", "secret": {"secretName": "triton-control"}}]
    own = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "triton-control"}}
    assert ensure_secrets(cluster, [pods, own]) == [], "the set brings its own"
    deploy(cluster, "demo", [pods], PATIENCE, silent)
    made = control_secret(cluster)
    assert len(made) == 48
    deploy(cluster, "demo", [pods], PATIENCE, silent)
    assert control_secret(cluster) == made, "made once"
    with pytest.raises(ClusterError, match="no key other"):
        control_secret(cluster, key="other")


def test_no_rights_to_the_pods(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    fake.denied.add(("create", "pods/portforward"))
    with pytest.raises(RolloutError, match=r"no right to get pods/portforward .*, create pods/portforward"):
        load_version(cluster, SERVER, VERSION, SECRET, pace=PACE)
