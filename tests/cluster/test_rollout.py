"""The wait for a rollout: progress, the pods' own reasons when it fails, watches that break, and the way back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.apply import apply, dry_run
from cluster.deploy import deploy, undo
from cluster.errors import ClusterError, RolloutError
from cluster.observe import Observed, observe, wait_for_change
from cluster.problems import problems
from cluster.revision import History, read_history, write_history
from cluster.rollout import progress, wait
from tests.cluster.deploy_objects import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    PATIENCE,
    SERVER,
    Seen,
    claim,
    config_map,
    connected,
    deployment,
    job,
    silent,
)
from tests.cluster.fake_cluster import LWS, FakeCluster
from tests.cluster.fake_controllers import event


def test_a_rollout_that_works(fake: FakeCluster, tmp_path: Path) -> None:
    seen = Seen()
    with connected(fake, tmp_path) as cluster:
        done = deploy(cluster, "demo", [deployment(replicas=3), config_map(), job()], PATIENCE, seen)
        again = deploy(cluster, "demo", [deployment(replicas=3), config_map(), job()], PATIENCE, seen)
    assert [item.ready for item in done.progress] == [3, 1]
    assert done.revision.outcome == "ready"
    assert "3 pods are available" in seen.texts
    assert {item.change for item in again.applied} == {"unchanged"}


def test_a_status_of_the_generation_before_does_not_count() -> None:
    old = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    item: dict[str, Any] = {"kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": old}
    assert progress(Observed(SERVER, item)).state == "progressing"
    current: dict[str, Any] = {**item, "status": {**old, "observedGeneration": 2}}
    assert progress(Observed(SERVER, current)).state == "done"
    surplus = {**current, "status": {**current["status"], "replicas": 2}}
    assert progress(Observed(SERVER, surplus)).text == "1 pods of the old revision are to end"
    assert progress(Observed(SERVER, None)).state == "failed"


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (
            "missing",
            r"pod server-\w+-0, container triton: (ErrImagePull|ImagePullBackOff): .*not found\. Fix: check the image",
        ),
        ("unconfigured", r'CreateContainerConfigError: configmap "settings" not found\. Fix: create the ConfigMap'),
        ("greedy", r"killed: over its memory limit of 8Gi\. Fix: raise the memory limit"),
        ("crashes", r"exits with 1, 3 restarts\. Fix: read the end of its log[\s\S]*\n    CUDA error: no kernel image"),
        ("quota", r"exceeded quota: gpus, requested: .*Fix: lower the replicas.*kubectl describe quota -n prod"),
    ],
)
def test_what_does_not_mend_itself_fails_with_its_reason(
    fake: FakeCluster, tmp_path: Path, behaviour: str, expected: str
) -> None:
    fake.images["bad"] = behaviour
    fake.logs["triton", True] = "loading\nCUDA error: no kernel image"
    with connected(fake, tmp_path) as cluster, pytest.raises(RolloutError, match=expected) as caught:
        deploy(cluster, "demo", [deployment("bad")], PATIENCE, silent)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("no-gpus", r"no node takes it: 0/3 nodes are available: 3 Insufficient nvidia\.com/gpu.*NVIDIA device plugin"),
        (
            "no-volume",
            r"PersistentVolumeClaim store: not bound: storageclass\S* \"shared\" not found\. Fix: name a storage",
        ),
        ("slow", r"Unhealthy: Readiness probe failed: 503\. Fix: give the model more time"),
    ],
)
def test_what_may_still_come_fails_at_the_time_limit(
    fake: FakeCluster, tmp_path: Path, behaviour: str, expected: str
) -> None:
    fake.images["bad"] = behaviour
    target = deployment("bad", replicas=1)
    target["spec"]["template"]["spec"]["volumes"] = [{"name": "s", "persistentVolumeClaim": {"claimName": "store"}}]
    event(fake, "store", "ProvisioningFailed", 'storageclass.storage.k8s.io "shared" not found')
    patience = dataclasses.replace(PATIENCE, timeout_s=1.0)
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [claim(), target]))
        seen = observe(cluster, SERVER)
        while not seen.pods:
            wait_for_change(cluster, seen, 1, 0.02)
            seen = observe(cluster, SERVER)
        event(fake, seen.pods[0]["metadata"]["name"], "Unhealthy", "Readiness probe failed: 503")
        with pytest.raises(RolloutError, match=r"not ready within 1 s; Deployment prod/server: .*" + expected):
            wait(cluster, [SERVER], patience, silent)


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("0/2 nodes are available: 2 node(s) had untolerated taint {gpu: yes}.", "add a toleration"),
        ("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.", "label a node"),
        ("0/2 nodes are available: 2 Insufficient cpu.", "add nodes, or lower"),
    ],
)
def test_why_no_node_takes_a_pod(message: str, fix: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    pod = {"metadata": {"name": "p"}, "status": {"conditions": [condition]}}
    (found,) = problems(Observed(SERVER, {"kind": "Deployment"}, pods=(pod,)))
    assert str(found).startswith(f"pod p: no node takes it: {message}. Fix: {fix}")
    assert found.waits


def test_a_pod_that_was_evicted() -> None:
    status = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    pod = {"metadata": {"name": "p"}, "status": status}
    (found,) = problems(Observed(SERVER, {"kind": "Deployment"}, pods=(pod,)))
    assert found.reason == "Evicted: The node was low on resource: memory."


def test_a_pod_whose_model_is_not_proven_there() -> None:
    """The kubelet keeps the end of the log; one failure is enough, because the next try gives the same."""
    error = "error: tiny version 2 is not proven on this machine: mean cosine 0.99663 (at least 0.998)"
    ended = {"exitCode": 1, "reason": "Error", "message": f"I1129 unloading: tiny\ntrireme: draining\n{error}\n"}
    state = {"name": "triton", "restartCount": 1, "state": {"running": {}}, "lastState": {"terminated": ended}}
    pod = {"metadata": {"name": "p"}, "status": {"containerStatuses": [state]}}
    (found,) = problems(Observed(SERVER, {"kind": "Deployment"}, pods=(pod,)))
    assert found.reason == f"exits with 1, 1 restarts: {error.removeprefix('error: ')}"
    assert found.fix.startswith("run the pod on another kind of node")
    ended["message"] = "error: something else"
    assert not problems(Observed(SERVER, {"kind": "Deployment"}, pods=(pod,))), "one crash may be bad luck"


def test_an_autoscaler_that_will_not_help_ends_the_wait(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "no-gpus"
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [deployment("bad", replicas=1)]))
        seen = observe(cluster, SERVER)
        while not seen.pods:
            wait_for_change(cluster, seen, 1, 0.02)
            seen = observe(cluster, SERVER)
        pod = seen.pods[0]["metadata"]["name"]
        event(fake, pod, "NotTriggerScaleUp", "pod didn't trigger scale-up: 2 Insufficient nvidia.com/gpu", "Normal")
        with pytest.raises(RolloutError, match=r"autoscaler: pod didn't trigger scale-up.*Fix: add nodes with enough"):
            wait(cluster, [SERVER], PATIENCE, silent)


def test_a_problem_that_passes_is_no_failure(fake: FakeCluster, tmp_path: Path) -> None:
    """A registry that is away for a moment: the problem is shown, and the rollout goes on."""
    fake.images["late"] = "missing"
    patience, shown = dataclasses.replace(PATIENCE, problem_s=20), list[str]()

    def mend(found: Any) -> None:
        for item in found:
            if item.problems:
                shown.append(str(item.problems[0]))
                fake.images["late"] = "runs"

    with connected(fake, tmp_path) as cluster:
        assert deploy(cluster, "demo", [deployment("late")], patience, mend).revision.outcome == "ready"
    assert "not found. Fix: check the image" in shown[0]


def test_the_deployments_own_deadline(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "slow"
    target = deployment("bad")
    target["spec"]["progressDeadlineSeconds"] = 20
    with (
        connected(fake, tmp_path, deadline_ticks=10) as cluster,
        pytest.raises(
            RolloutError, match=r"^Deployment prod/server: no progress within its deadline of 20 s.*Fix: look at"
        ),
    ):
        deploy(cluster, "demo", [target], PATIENCE, silent)


def test_a_job_that_fails(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"], fake.logs["build", False] = "crashes", "EngineError: sm75 is not supported"
    with (
        connected(fake, tmp_path) as cluster,
        pytest.raises(RolloutError, match=r"Job prod/engines: BackoffLimitExceeded[^\n]*\n    EngineError: sm75"),
    ):
        deploy(cluster, "demo", [job("bad")], PATIENCE, silent)


def test_a_finished_job_makes_room_for_its_successor(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [job()], PATIENCE, silent)
        assert [item.change for item in dry_run(cluster, [job("newer")])] == ["replaced"]
        done = deploy(cluster, "demo", [job("newer")], PATIENCE, silent)
        assert [item.change for item in done.applied] == ["replaced"]
        assert done.progress[0].state == "done"


def test_a_leader_worker_set(fake: FakeCluster, tmp_path: Path) -> None:
    fake.kinds[LWS] = ("LeaderWorkerSet", True)
    template = {"spec": {"containers": [{"name": "rank", "image": "good"}]}}
    item = {
        "apiVersion": LWS[0],
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "ranks"},
        "spec": {"replicas": 2, "leaderWorkerTemplate": {"size": 2, "workerTemplate": template}},
    }
    seen = Seen()
    with connected(fake, tmp_path) as cluster:
        assert deploy(cluster, "demo", [item], PATIENCE, seen).progress[0].text == "2 groups are ready"
        fake.images["bad"] = "no-gpus"
        template["spec"]["containers"][0]["image"] = "bad"
        fake.remove((*LWS, "prod", "ranks"))
        short = dataclasses.replace(PATIENCE, timeout_s=0.5)
        with pytest.raises(RolloutError, match=r"LeaderWorkerSet prod/ranks: .*Insufficient nvidia\.com/gpu"):
            deploy(cluster, "demo", [item], short, silent)


def test_a_workload_that_is_deleted_meanwhile(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["good"] = "slow"

    def remove(found: Any) -> None:
        if found[0].wanted:
            fake.remove(("apps/v1", "deployments", "prod", "server"))

    with connected(fake, tmp_path) as cluster, pytest.raises(RolloutError, match="it is not in the cluster"):
        deploy(cluster, "demo", [deployment()], PATIENCE, remove)


@pytest.mark.parametrize("as_event", [True, False])
def test_a_version_that_the_server_has_forgotten(fake: FakeCluster, tmp_path: Path, as_event: bool) -> None:
    fake.gone_as_event = as_event
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [deployment()]))
        seen, pauses = observe(cluster, SERVER), list[float]()
        fake.store(("v1", "configmaps", "prod", "other"), {"metadata": {}})
        fake.compact()
        wait_for_change(cluster, seen, 20, 0.5, pauses.append)
        assert 0 < pauses[0] <= 0.5, "it ends at once, but never faster than the pause"
        assert wait(cluster, [SERVER], PATIENCE, silent)[0].state == "done"


def test_an_event_ends_the_wait(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [deployment()]))
        seen, pauses = observe(cluster, SERVER), list[float]()
        wait_for_change(cluster, seen, 20, 0.5, pauses.append)
        assert pauses == []
        assert observe(cluster, SERVER).version != seen.version


def test_a_server_that_is_away_for_a_while(fake: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Managed control planes restart under a rollout; a refusal that will not change ends it at once."""
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [deployment()]))
        whole, failures = cluster.list_objects, [ClusterError("x", got="", expected="", fix="", code=503)] * 3

        def flaky(*arguments: Any) -> Any:
            if failures:
                raise failures.pop()
            return whole(*arguments)

        monkeypatch.setattr(cluster, "list_objects", flaky)
        assert wait(cluster, [SERVER], PATIENCE, silent)[0].state == "done"
        failures.append(ClusterError("x", got="", expected="", fix="", code=403))
        with pytest.raises(ClusterError):
            wait(cluster, [SERVER], PATIENCE, silent)


def test_undo_brings_back_the_whole_set(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(), config_map(a="1"), config_map("only-first")], PATIENCE, silent)
        second = deploy(
            cluster, "demo", [deployment("better"), config_map(a="2"), config_map("only-second")], PATIENCE, silent
        )
        assert [str(name) for name in second.deleted] == ["ConfigMap prod/only-first"]
        restored = undo(cluster, "demo", PATIENCE, silent)
        assert (restored.revision.number, restored.revision.restores) == (3, 1)
        found = cluster.get(DEPLOYMENTS, "prod", "server")
        assert found is not None
        assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "good"
        settings = cluster.get(CONFIG_MAPS, "prod", "settings")
        assert settings is not None
        assert settings["data"] == {"a": "1"}
        assert cluster.get(CONFIG_MAPS, "prod", "only-first") is not None
        assert cluster.get(CONFIG_MAPS, "prod", "only-second") is None
        with pytest.raises(ClusterError, match="none before the current one that became ready"):
            undo(cluster, "demo", PATIENCE, silent)


def test_undo_on_failure(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "missing"
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(), config_map()], PATIENCE, silent)
        broken = [deployment("bad"), config_map("extra")]
        with pytest.raises(RolloutError, match=r"ImagePull[\s\S]*undone: revision 1 is back as revision 3"):
            deploy(cluster, "demo", broken, PATIENCE, silent, undo_on_failure=True)
        assert progress(observe(cluster, SERVER)).state == "done"
        assert cluster.get(CONFIG_MAPS, "prod", "extra") is None
        assert [item.outcome for item in read_history(cluster, "demo").revisions] == ["ready", "failed", "ready"]


def test_a_first_deployment_that_fails_stays_to_be_looked_at(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "missing"
    with connected(fake, tmp_path) as cluster:
        with pytest.raises(RolloutError, match=r"not undone: .*expected an earlier set to go back to"):
            deploy(cluster, "demo", [deployment("bad")], PATIENCE, silent, undo_on_failure=True)
        assert cluster.get(DEPLOYMENTS, "prod", "server") is not None


def test_what_holds_data_is_left_and_named(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [claim(), config_map()], PATIENCE, silent)
        done = deploy(cluster, "demo", [config_map()], PATIENCE, silent)
    assert [str(name) for name in done.left] == ["PersistentVolumeClaim prod/store"]
    assert ("v1", "persistentvolumeclaims", "prod", "store") in fake.objects


def test_two_deployments_at_once(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        first = write_history(cluster, read_history(cluster, "demo").begin([config_map()]))
        write_history(cluster, first.end("ready"))
        with pytest.raises(ClusterError, match=r"the object has been modified.*run the command again"):
            write_history(cluster, first.end("failed"))


def test_history_is_short_and_keeps_what_worked() -> None:
    history = History("demo").begin([config_map()]).end("ready")
    for number in range(20):
        history = history.begin([config_map(f"bad-{number}")]).end("failed")
    assert [item.number for item in history.revisions] == [1, 18, 19, 20, 21]
    ready = history.last_ready(before=21)
    assert ready is not None
    assert ready.documents == (config_map(),)


def test_a_record_that_is_not_ours(fake: FakeCluster, tmp_path: Path) -> None:
    fake.store(("v1", "configmaps", "prod", "trireme-revisions-demo"), {"metadata": {}, "data": {"revisions": "bm8="}})
    with connected(fake, tmp_path) as cluster, pytest.raises(ClusterError, match="delete this ConfigMap"):
        undo(cluster, "demo", PATIENCE, silent)


def test_a_wait_that_is_interrupted_leaves_a_record(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "slow"

    def interrupt(found: Any) -> None:
        raise KeyboardInterrupt

    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)
        with pytest.raises(KeyboardInterrupt):
            deploy(cluster, "demo", [deployment("bad")], PATIENCE, interrupt)
        assert undo(cluster, "demo", PATIENCE, silent).revision.restores == 1
