"""A model version on running pods: one at a time, at the pace of budget and readiness, stopped by the first failure."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from builders.deploy.client.apply import apply
from builders.deploy.client.cluster import Cluster
from builders.deploy.client.deployment import deploy
from builders.deploy.client.models import (
    CONTROL_HEADER,
    ModelVersion,
    Pace,
    allows,
    control_headers,
    load_version,
    settle_s,
)
from builders.deploy.client.observe import observe
from builders.errors import ClusterError, RolloutError
from runtime.triton import TritonServer
from tests.deploy_objects import PATIENCE, SERVER, connected, deployment, silent
from tests.fake_cluster import FakeCluster

SECRET = "open-sesame"
PACE = Pace(load_s=20, ready_s=0.5, pause_s=0.02)
VERSION = ModelVersion(("part", "ensemble"), 2)
HEADERS = {CONTROL_HEADER: SECRET}


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The repository control of one pod: real gRPC, and Triton's own rules of what a load answers."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.broken = self.missing = False
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
        return service_pb2.RepositoryModelLoadResponse()

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        ready = request.version == "2" and not self.missing and request.name in self.loaded and self.still_there()
        return service_pb2.ModelReadyResponse(ready=ready)


@pytest.fixture
def fake() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def cluster(fake: FakeCluster, tmp_path: Path) -> Iterator[Cluster]:
    with connected(fake, tmp_path) as found:
        deploy(found, "demo", [deployment(replicas=3)], PATIENCE, silent)
        yield found


@pytest.fixture
def pods(fake: FakeCluster, cluster: Cluster) -> Iterator[dict[str, Triton]]:
    """A server for each pod, by the pod's name."""
    servers, found = [], {}
    for pod in observe(cluster, SERVER).pods:
        name = pod["metadata"]["name"]
        found[name] = Triton()
        server = grpc.server(futures.ThreadPoolExecutor(2))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(found[name], server)
        fake.addresses[name, 8001] = ("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        server.start()
        servers.append(server)
    yield found
    for server in servers:
        server.stop(0).wait()


def test_one_pod_after_another(cluster: Cluster, pods: dict[str, Triton]) -> None:
    told: list[str] = []
    assert load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE, report=told.append) == list(pods)
    assert [server.loaded for server in pods.values()] == [["part", "ensemble"]] * 3
    assert told == [line for pod in pods for line in (f"{pod}: loading version 2", f"{pod}: serves version 2")]


def test_a_version_that_fails_stops_at_its_first_pod(cluster: Cluster, pods: dict[str, Triton]) -> None:
    first, second, third = pods
    pods[second].broken = True
    expected = (
        rf"{second}: Triton: failed to load 'part'.*Version 2 is in 1 of 3 pods \({first}\); "
        rf"{second}, {third} keep what they served\. Fix:"
    )
    with pytest.raises(RolloutError, match=expected):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE)
    assert pods[third].loaded == []


def test_a_version_that_is_not_in_the_store(cluster: Cluster, pods: dict[str, Triton]) -> None:
    next(iter(pods.values())).missing = True
    with pytest.raises(RolloutError, match="part has no version 2 after the load; is it in the store"):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE)


def test_a_pod_that_is_not_ready_after_the_load(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    first, second, _ = pods
    pods[first].on_load = lambda: fake.images.update(good="slow")
    with pytest.raises(
        RolloutError, match=rf"{first}: it is not ready again within .*Version 2 is in 0 of 3 pods \(none\)"
    ):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=dataclasses.replace(PACE, ready_s=0.3))
    assert pods[second].loaded == []


def test_a_server_that_dies_of_the_load(cluster: Cluster, pods: dict[str, Triton]) -> None:
    """The kubelet restarts it, and it is ready again: without the version."""
    first = next(iter(pods))
    answers = iter([True, True, False])  # both models right after the load, then none
    pods[first].still_there = lambda: next(answers)
    with pytest.raises(RolloutError, match=rf"{first}: part has no version 2 after the load"):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE)


def test_a_pod_that_goes_meanwhile(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    first, second, third = pods

    def scale_down() -> None:
        fake.objects["apps/v1", "deployments", "prod", "server"]["spec"]["replicas"] = 2
        if ("v1", "pods", "prod", third) in fake.objects:
            fake.remove(("v1", "pods", "prod", third))

    pods[first].on_load = scale_down
    assert load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE) == [first, second]


def test_never_below_the_disruption_budget(cluster: Cluster, pods: dict[str, Triton]) -> None:
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "server"},
        "spec": {"minAvailable": 3, "selector": {"matchLabels": {"app": "server"}}},
    }
    list(apply(cluster, [budget]))
    with pytest.raises(RolloutError, match="its disruption budget does not allow to do without it"):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE)
    assert not any(server.loaded for server in pods.values())
    budget["spec"] = {"minAvailable": 2, "selector": {"matchLabels": {"app": "server"}}}
    list(apply(cluster, [budget]))
    assert len(load_version(cluster, SERVER, VERSION, HEADERS, pace=dataclasses.replace(PACE, ready_s=20))) == 3


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
    with pytest.raises(ClusterError, match=r"Secret prod/control: got no such Secret.*--control-secret"):
        control_headers(cluster, "control", "token")
    data = {"token": base64.b64encode(f"{SECRET}\n".encode()).decode()}
    fake.store(("v1", "secrets", "prod", "control"), {"metadata": {}, "data": data})
    assert control_headers(cluster, "control", "token") == HEADERS
    with pytest.raises(ClusterError, match="no key other"):
        control_headers(cluster, "control", "other")


def test_no_rights_to_the_pods(cluster: Cluster, pods: dict[str, Triton], fake: FakeCluster) -> None:
    fake.denied.add(("create", "pods/portforward"))
    with pytest.raises(RolloutError, match="no right to get pods/portforward, create pods/portforward"):
        load_version(cluster, SERVER, VERSION, HEADERS, pace=PACE)


@pytest.mark.triton
def test_a_real_triton(fake: FakeCluster, tmp_path: Path, server: TritonServer) -> None:
    """Through the websocket to a real server: the load with its secret, and the refusal without."""
    wanted = ModelVersion(server.settings.load_order, server.settings.version)
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(replicas=1)], PATIENCE, silent)
        pod = observe(cluster, SERVER).pods[0]["metadata"]["name"]
        fake.addresses[pod, 8001] = ("127.0.0.1", server.ports.grpc)
        assert load_version(cluster, SERVER, wanted, server.control_headers, pace=PACE) == [pod]
        with pytest.raises(RolloutError, match="restricted"):
            load_version(cluster, SERVER, wanted, {}, pace=PACE)
        with pytest.raises(RolloutError, match="has no version 999"):
            load_version(cluster, SERVER, ModelVersion(wanted.models, 999), server.control_headers, pace=PACE)
