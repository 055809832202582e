"""The way back when a Job hangs, when nothing is left to go back to, and over many failures; and what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from cluster.apply import apply, dry_run
from cluster.deploy import deploy, plan, undo
from cluster.diff import changes_text
from cluster.errors import ClusterError, RolloutError
from cluster.kinds import Resource, conditions
from cluster.observe import observe
from cluster.revision import History, read_history
from cluster.rollout import looks_at, progress
from tests.cluster.deploy_objects import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    PATIENCE,
    config_map,
    connected,
    deployment,
    job,
    silent,
)
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_controllers import event

JOBS = Resource("batch/v1", "Job", "jobs", True)
SHORT = dataclasses.replace(PATIENCE, timeout_s=1.0)


@pytest.fixture
def fake() -> FakeCluster:
    found = FakeCluster()
    found.images["bad"] = "missing"
    return found


def image(cluster: Cluster, resource: Resource, name: str) -> str:
    item = cluster.get(resource, "prod", name)
    assert item is not None
    return str(item["spec"]["template"]["spec"]["containers"][0]["image"])


def last_line(error: BaseException) -> str:
    return str(error).splitlines()[-1]


@pytest.mark.parametrize("behaviour", ["missing", "no-gpus", "unconfigured", "quota"])
def test_a_job_that_has_not_started_makes_room(fake: FakeCluster, tmp_path: Path, behaviour: str) -> None:
    fake.images["bad"] = behaviour
    with connected(fake, tmp_path) as cluster:
        with pytest.raises(RolloutError):
            deploy(cluster, "demo", [job("bad")], SHORT, silent)
        done = deploy(cluster, "demo", [job()], PATIENCE, silent)
    assert [item.change for item in done.applied] == ["replaced"]


def test_a_job_that_runs_is_deleted_by_undo_alone(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"] = "slow"
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(), job()], PATIENCE, silent)
        with pytest.raises(RolloutError):
            deploy(cluster, "demo", [deployment(), job("bad")], SHORT, silent)
        with pytest.raises(ClusterError, match="while it runs") as caught:
            deploy(cluster, "demo", [deployment(), job("other")], PATIENCE, silent)
        assert last_line(caught.value) == (
            "State: nothing was changed, so there is nothing for `trireme undo` to take back"
        )
        restored = undo(cluster, "demo", PATIENCE, silent)
        assert [str(name) for name in restored.deleted] == ["Job prod/engines"]


def test_a_job_that_cannot_be_deleted_is_named(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(), job()], PATIENCE, silent)
        with pytest.raises(RolloutError):
            deploy(cluster, "demo", [deployment("bad"), job("bad")], PATIENCE, silent)
        fake.denied.add(("delete", "jobs"))
        with pytest.raises(RolloutError, match=r"what serves is back and ready, but a Job.*no right to delete jobs"):
            undo(cluster, "demo", PATIENCE, silent)
        assert image(cluster, DEPLOYMENTS, "server") == "good"


def test_never_undone_when_it_is_not(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)

        def nodes_gone(found: Any) -> None:
            fake.images["good"] = "no-gpus"

        with pytest.raises(RolloutError) as caught:
            deploy(cluster, "demo", [deployment("bad")], SHORT, nodes_gone, undo_on_failure=True)
    assert "not undone: " in str(caught.value)
    assert " undone: " not in str(caught.value).replace("not undone: ", "")
    assert last_line(caught.value) == (
        "State: revision 3 (not ready) is in the cluster, whole or in part; `trireme undo` brings revision 1 back"
    )


def test_each_failure_ends_with_the_state_and_undo(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        with pytest.raises(RolloutError) as first:
            deploy(cluster, "demo", [deployment("bad")], PATIENCE, silent)
        assert "`trireme undo` has no earlier set that became ready" in last_line(first.value)
        with pytest.raises(RolloutError) as way_back:
            deploy(cluster, "demo", [deployment("bad", replicas=3)], PATIENCE, silent, undo_on_failure=True)
        assert "not undone: undo of demo" in str(way_back.value)
        assert "revision 2 (not ready) is in the cluster" in last_line(way_back.value)
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)
        fake.quota["ConfigMap"] = "exceeded quota: maps, requested: count/configmaps=1"
        with pytest.raises(ClusterError) as refused:
            deploy(cluster, "demo", [deployment("other"), config_map("more")], PATIENCE, silent)
        assert last_line(refused.value).startswith("State: nothing was changed")
        with pytest.raises(ClusterError) as tried:
            plan(cluster, [deployment("other"), config_map("more")])
        assert last_line(tried.value) == last_line(refused.value)
        assert refused.value.exit_code == 2


def test_an_interruption_tells_the_state(fake: FakeCluster, tmp_path: Path) -> None:
    fake.images["bad"], told = "slow", list[str]()

    def interrupt(found: Any) -> None:
        raise KeyboardInterrupt

    with connected(fake, tmp_path) as cluster:
        cluster.warn = told.append
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)
        with pytest.raises(KeyboardInterrupt):
            deploy(cluster, "demo", [deployment("bad")], PATIENCE, interrupt)
    assert told[-1].endswith(
        "State: revision 2 (not known to be ready) is in the cluster, whole or in part; "
        "`trireme undo` brings revision 1 back"
    )


def test_the_same_set_that_fails_later_was_ready_once(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)
        deploy(cluster, "demo", [deployment("better")], PATIENCE, silent)
        fake.images["better"] = "missing"
        fake.remove(("apps/v1", "deployments", "prod", "server"))
        with pytest.raises(
            RolloutError, match=r"revision 2 \(was ready before\).*`trireme undo` brings revision 1 back"
        ):
            deploy(cluster, "demo", [deployment("better")], PATIENCE, silent)
        assert [item.outcome for item in read_history(cluster, "demo").revisions] == ["ready", "ready"]


def test_many_failures_leave_no_orphans(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment()], PATIENCE, silent)
        for number in range(7):
            with pytest.raises(RolloutError):
                deploy(cluster, "demo", [deployment("bad"), config_map(f"try-{number}")], PATIENCE, silent)
        assert len(read_history(cluster, "demo").revisions) == 5
        deploy(cluster, "demo", [deployment("better")], PATIENCE, silent)
        left = {key[3] for key, _ in fake.find("v1", "configmaps")}
        assert left == {"trireme-revisions-demo"}
        assert not read_history(cluster, "demo").strays


def test_names_of_dropped_sets_stay_until_one_is_ready() -> None:
    history = History("demo")
    for number in range(8):
        history = history.begin([config_map(f"try-{number}")]).end("failed")
    live = {item["metadata"]["name"] for item in history.live}
    assert live == {f"try-{number}" for number in range(8)}
    assert not history.begin([config_map()]).end("ready").strays


def test_undo_needs_the_right_to_delete_what_goes(fake: FakeCluster, tmp_path: Path) -> None:
    """A set of before holds a kind that this one has not: asked about before anything is changed."""
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [deployment(), job(), config_map()], PATIENCE, silent)
        fake.denied.add(("delete", "jobs"))
        with pytest.raises(ClusterError, match=r"no right to delete jobs\.batch"):
            deploy(cluster, "demo", [deployment("better"), config_map()], PATIENCE, silent)


def test_a_job_that_is_gone_has_ended(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [job()], PATIENCE, silent)
        name = next(iter(dry_run(cluster, [job()]))).name
        fake.remove(("batch/v1", "jobs", "prod", "engines"))
        (look,) = looks_at(cluster, [name], settled=True)
        assert (look.state, look.text) == ("done", "it has ended, and was removed after its time to live")
        assert looks_at(cluster, [name], settled=False)[0].state == "failed"


def test_events_of_a_namesake_are_not_the_jobs(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        event(fake, "engines", "FailedCreate", "of a Service")
        for key, item in fake.find("v1", "events"):
            fake.store(key, {**item, "involvedObject": {"kind": "Service", "name": "engines"}})
        assert deploy(cluster, "demo", [job()], PATIENCE, silent).revision.outcome == "ready"
        fake.remove(("v1", "pods", "prod", "engines-0"))
        name = next(iter(dry_run(cluster, [job()]))).name
        assert not progress(observe(cluster, name)).problems


def test_a_diff_of_a_job_has_no_defaults_in_it(fake: FakeCluster, tmp_path: Path) -> None:
    """What the server fills in stands on both sides."""
    old, new = job(), job("newer")
    for item in (old, new):
        item["spec"]["podFailurePolicy"] = {
            "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
        }
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [old], PATIENCE, silent)
        text = changes_text(dry_run(cluster, [new]))
        found = cluster.get(JOBS, "prod", "engines")
        assert found is not None
        assert conditions(found)
    changed = [line for line in text.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ["-      - image: good", "+      - image: newer"]


def test_a_diff_shows_the_conflict_that_deploy_would_refuse(fake: FakeCluster, tmp_path: Path) -> None:
    with connected(fake, tmp_path) as cluster:
        list(apply(cluster, [deployment()]))
        fake.owners["apps/v1", "deployments", "prod", "server"]["spec", "replicas"] = {"kubectl-edit"}
        text = changes_text(dry_run(cluster, [deployment(replicas=3)], show_conflicts=True))
        assert "# Deployment prod/server: deploy refuses this without --force-conflicts: .spec.replicas set by" in text
        assert "+  replicas: 3" in text
        with pytest.raises(ClusterError, match="--force-conflicts"):
            dry_run(cluster, [deployment(replicas=3)])


def test_secrets_of_a_set_come_back_too(fake: FakeCluster, tmp_path: Path) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"key": "b2xk"}}
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [secret, config_map()], PATIENCE, silent)
        deploy(cluster, "demo", [{**secret, "data": {"key": "bmV3"}}, config_map()], PATIENCE, silent)
        record = cluster.get(CONFIG_MAPS, "prod", "trireme-revisions-demo")
        assert record is not None
        assert "b2xk" not in str(read_history(cluster, "demo")), "the record holds no secret"
        undo(cluster, "demo", PATIENCE, silent)
        assert fake.objects["v1", "secrets", "prod", "s"]["data"] == {"key": "b2xk"}
