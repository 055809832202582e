"""Server-side apply, dry runs and diffs against the fake API server, and what the server refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api import Cluster
from cluster.apply import apply, dry_run, in_order
from cluster.deploy import deploy
from cluster.diff import changes_text
from cluster.errors import ClusterError
from cluster.refusal import Operation, refused
from cluster.rights import needed_to_apply, require_rights
from runtime.ports import free_ports
from tests.cluster.deploy_objects import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    PATIENCE,
    claim,
    config_map,
    connected,
    deployment,
    job,
    silent,
)
from tests.cluster.fake_api import write_kubeconfig
from tests.cluster.fake_cluster import FakeCluster

NAMESPACE: dict[str, Any] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "fresh"}}


def changes(found: Any) -> dict[str, str]:
    return {str(item.name): item.change for item in found}


def test_create_then_nothing_to_do_then_change(cluster: Cluster, fake: FakeCluster) -> None:
    first = changes(apply(cluster, [deployment(), config_map()]))
    assert first == {"ConfigMap prod/settings": "created", "Deployment prod/server": "created"}
    assert next(iter(first)) == "ConfigMap prod/settings", "what others need comes first"
    assert set(changes(apply(cluster, [deployment(), config_map()])).values()) == {"unchanged"}
    assert changes(apply(cluster, [deployment("better")])) == {"Deployment prod/server": "changed"}
    key = ("apps/v1", "deployments", "prod", "server")
    assert fake.objects[key]["metadata"]["generation"] == 2


def test_a_field_that_is_no_longer_applied_goes(cluster: Cluster) -> None:
    list(apply(cluster, [config_map(a="1", b="2")]))
    list(apply(cluster, [config_map(a="1")]))
    found = cluster.get(CONFIG_MAPS, "prod", "settings")
    assert found is not None
    assert found["data"] == {"a": "1"}


def test_what_an_autoscaler_set_stays(cluster: Cluster, fake: FakeCluster) -> None:
    scaled = deployment()
    del scaled["spec"]["replicas"]
    list(apply(cluster, [scaled]))
    fake.objects["apps/v1", "deployments", "prod", "server"]["spec"]["replicas"] = 7
    list(apply(cluster, [scaled]))
    found = cluster.get(DEPLOYMENTS, "prod", "server")
    assert found is not None
    assert found["spec"]["replicas"] == 7


def test_conflict_names_field_and_owner(cluster: Cluster, fake: FakeCluster) -> None:
    list(apply(cluster, [deployment()]))
    owners = fake.owners["apps/v1", "deployments", "prod", "server"]
    owners["spec", "replicas"] = {"kubectl-edit"}
    with pytest.raises(ClusterError, match=r"\.spec\.replicas set by kubectl-edit.*--force-conflicts") as caught:
        list(apply(cluster, [deployment(replicas=3)]))
    assert caught.value.code == 409
    list(apply(cluster, [deployment(replicas=3)], force=True))
    assert owners != fake.owners["apps/v1", "deployments", "prod", "server"]


def test_dry_run_changes_nothing_and_diff_shows_what_would(cluster: Cluster, fake: FakeCluster) -> None:
    list(apply(cluster, [deployment(), config_map()]))
    before = fake.objects["apps/v1", "deployments", "prod", "server"]["metadata"]["resourceVersion"]
    text = changes_text(dry_run(cluster, [deployment("better"), config_map(), config_map("new")]))
    assert "-      - image: good\n+      - image: better\n" in text
    assert "+++ applied ConfigMap prod/new" in text
    assert "settings" not in text, "what stays the same is not shown"
    assert "managedFields" not in text
    assert fake.objects["apps/v1", "deployments", "prod", "server"]["metadata"]["resourceVersion"] == before
    assert changes_text(dry_run(cluster, [deployment(), config_map()])) == ""


def test_a_diff_keeps_secrets(cluster: Cluster) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"same": "aaaa", "key": "b2xk"}}
    list(apply(cluster, [secret]))
    text = changes_text(dry_run(cluster, [{**secret, "data": {"same": "aaaa", "key": "bmV3"}}]))
    assert "-  key: '*** (before)'\n+  key: '*** (after)'\n" in text
    assert "bmV3" not in text
    assert "b2xk" not in text


def test_a_namespace_of_the_set_comes_first_and_hides_its_objects_from_a_dry_run(cluster: Cluster) -> None:
    inside = config_map()
    inside["metadata"]["namespace"] = "fresh"
    assert changes(dry_run(cluster, [inside, NAMESPACE])) == {
        "Namespace fresh": "created",
        "ConfigMap fresh/settings": "unchecked",
    }
    assert set(changes(apply(cluster, [inside, NAMESPACE])).values()) == {"created"}


def test_a_kind_that_the_set_defines(cluster: Cluster, fake: FakeCluster) -> None:
    names = {"kind": "Shape", "plural": "shapes"}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "shapes.example.org"},
        "spec": {"group": "example.org", "names": names, "versions": [{"name": "v1"}]},
    }
    shape = {"apiVersion": "example.org/v1", "kind": "Shape", "metadata": {"name": "round"}}
    assert changes(dry_run(cluster, [shape, definition]))["Shape round"] == "unchecked"
    applied = apply(cluster, [shape, definition])
    assert str(next(applied).name) == "CustomResourceDefinition shapes.example.org"
    fake.kinds["example.org/v1", "shapes"] = ("Shape", True)  # the server takes the definition up
    assert changes(applied) == {"Shape prod/round": "created"}


@pytest.mark.parametrize(
    ("api_version", "kind", "hint"),
    [("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "install LeaderWorkerSet"), ("a.b/v1", "C", "custom resource")],
)
def test_a_kind_that_the_cluster_does_not_know(cluster: Cluster, api_version: str, kind: str, hint: str) -> None:
    with pytest.raises(ClusterError, match=hint):
        list(apply(cluster, [{"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}]))


def test_an_invalid_object_with_its_causes(cluster: Cluster) -> None:
    wrong = deployment()
    wrong["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
    with pytest.raises(ClusterError, match=r"spec\.template\.metadata\.labels: Invalid value") as caught:
        dry_run(cluster, [wrong])
    assert (caught.value.code, caught.value.exit_code) == (422, 2)
    list(apply(cluster, [deployment()]))
    moved = deployment()
    moved["spec"]["selector"]["matchLabels"] = moved["spec"]["template"]["metadata"]["labels"] = {"app": "new"}
    with pytest.raises(ClusterError, match=r"spec\.selector: field is immutable"):
        dry_run(cluster, [moved])


def test_a_job_that_runs_is_not_replaced(cluster: Cluster, fake: FakeCluster) -> None:
    """No controllers here, so it never ends."""
    started = job()
    started["spec"]["selector"] = {"matchLabels": {"job": "engines"}}
    list(apply(cluster, [started]))
    uid = fake.objects["batch/v1", "jobs", "prod", "engines"]["metadata"]["uid"]
    about = {"labels": {"job": "engines"}, "ownerReferences": [{"uid": uid}]}
    pod = {"metadata": about, "status": {"phase": "Running"}}
    fake.store(("v1", "pods", "prod", "engines-0"), pod)
    for attempt in (dry_run, apply):
        with pytest.raises(
            ClusterError, match=r"a change of its template while it runs.*kubectl delete job -n prod engines"
        ):
            list(attempt(cluster, [job("newer")]))


def test_an_unknown_field_is_refused(cluster: Cluster) -> None:
    wrong = deployment()
    wrong["spec"]["replica"] = 3
    with pytest.raises(ClusterError, match=r'unknown field "spec\.replica"'):
        dry_run(cluster, [wrong])


def test_quota(cluster: Cluster, fake: FakeCluster) -> None:
    fake.quota["PersistentVolumeClaim"] = "exceeded quota: storage, requested: 1, used: 4, limited: 4"
    with pytest.raises(ClusterError, match=r"exceeded quota: storage.*kubectl describe quota -n prod"):
        dry_run(cluster, [claim()])


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (
            403,
            'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
            "securityContext",
        ),
        (
            403,
            "unable to create new content in namespace prod because it is being terminated",
            "wait until namespace prod",
        ),
        (
            403,
            'admission webhook "policy.example.org" denied the request: no team label',
            "change what the policy names",
        ),
        (401, "Unauthorized", "log in again"),
        (429, "too many requests", "try again later"),
        (500, "etcdserver: leader changed", "then try again"),
    ],
)
def test_each_refusal_has_a_next_step(code: int, message: str, expected: str) -> None:
    found = refused(Operation("patch", DEPLOYMENTS, "prod", "server"), code, {"message": message})
    assert str(found).startswith(f"patch deployments.apps server in namespace prod: got {message}; expected ")
    assert expected in found.fix
    assert found.code == code


def test_a_missing_right_names_verb_and_resource(cluster: Cluster, fake: FakeCluster) -> None:
    fake.denied.add(("patch", "deployments"))
    with pytest.raises(ClusterError, match=r"rights of tester in namespace prod.*no right to patch deployments\.apps"):
        dry_run(cluster, [deployment()])


def test_all_missing_rights_in_one_answer_and_nothing_is_changed(cluster: Cluster, fake: FakeCluster) -> None:
    fake.denied |= {("create", "deployments"), ("get", "pods/log"), ("watch", "jobs")}
    documents = [deployment(), job(), config_map()]
    with pytest.raises(ClusterError) as caught:
        deploy(cluster, "demo", documents, PATIENCE, silent)
    assert caught.value.got == "no right to watch jobs.batch, create deployments.apps, get pods/log"
    assert not [name for verb, _, name in fake.requests if verb in ("patch", "update") and name]
    fake.denied.clear()
    require_rights(cluster, needed_to_apply(cluster, documents))


def test_a_refused_object_leaves_the_others_alone(fake: FakeCluster, tmp_path: Path) -> None:
    wrong = deployment()
    wrong["spec"]["template"]["metadata"]["labels"] = {"app": "other"}
    with connected(fake, tmp_path) as cluster:
        with pytest.raises(ClusterError):
            deploy(cluster, "demo", [config_map(), wrong], PATIENCE, silent)
        assert cluster.get(CONFIG_MAPS, "prod", "settings") is None


def test_no_cluster(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with (
        Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", url)) as cluster,
        pytest.raises(
            ClusterError, match=r"API server http://127\.0\.0\.1:\d+: got .*refused.*Fix: check that the cluster runs"
        ),
    ):
        dry_run(cluster, [config_map()])


def test_no_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"--kubeconfig and --context; `kind create cluster`"):
        Cluster.connect(tmp_path / "absent")
    (tmp_path / "broken").write_text("clusters: 3\n")
    with pytest.raises(ClusterError, match="expected a kubeconfig with a current context"):
        Cluster.connect(tmp_path / "broken")


def test_a_web_page_is_no_cluster(tmp_path: Path, httpd: str) -> None:
    with (
        Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", httpd)) as cluster,
        pytest.raises(ClusterError, match="not a web page or proxy"),
    ):
        dry_run(cluster, [config_map()])


@pytest.fixture
def httpd() -> Iterator[str]:
    """A server that answers every GET with a page."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_written_outside_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeCluster
) -> None:
    """The library's dynamic client would leave a discovery cache in the temporary folder."""
    import tempfile

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    with connected(fake, tmp_path) as cluster:
        deploy(cluster, "demo", [config_map(), deployment(replicas=1)], PATIENCE, silent)
    assert list(home.iterdir()) == []


KNOWN = [
    "Deployment",
    "Namespace",
    "ConfigMap",
    "Widget",
    "Service",
    "CustomResourceDefinition",
    "HorizontalPodAutoscaler",
]


@given(st.lists(st.sampled_from(KNOWN)))
def test_order_is_a_stable_permutation(kinds: list[str]) -> None:
    documents = [{"kind": kind, "number": number} for number, kind in enumerate(kinds)]
    ordered = in_order(documents)
    assert sorted(ordered, key=lambda item: item["number"]) == documents
    ranks = [
        "Namespace",
        "CustomResourceDefinition",
        "ConfigMap",
        "Service",
        "Widget",
        "Deployment",
        "HorizontalPodAutoscaler",
    ]
    assert [ranks.index(item["kind"]) for item in ordered] == sorted(ranks.index(kind) for kind in kinds)
    assert in_order(ordered) == ordered
