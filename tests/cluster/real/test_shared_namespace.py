"""A namespace of others, its admin, and two specs in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from builders.commands import cluster as commands
from builders.manifests.overlay import RENDERED, write_manifests
from cluster.api import Cluster
from cluster.apply import apply
from cluster.control import ensure_secrets
from cluster.deploy import deploy
from cluster.errors import ClusterError, RolloutError
from cluster.kinds import NAMESPACES, PODS, SECRETS, Object, Resource, label_selector, metadata
from tests.cluster.deploy_objects import CONFIG_MAPS, config_map, silent
from tests.cluster.real.bed import IMAGE, Bed, SmallBed, assert_unchanged, deployment, job, labelled
from tests.conftest import needs_kubectl
from tests.manifests.test_overlay import objects_of, spec_with

POLICIES = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", True)
NO_OPERATOR: dict[str, Any] = {"monitoring": False, "scaling": {"by": "none"}}


def restricted(bed: Bed) -> Object:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": bed.place, "labels": labels}}


def labels_of(bed: Bed) -> dict[str, str]:
    found = bed.cluster.get(NAMESPACES, None, bed.place)
    assert found is not None
    return dict(found["metadata"]["labels"])


def test_an_existing_namespace_is_left_alone(bed: Bed) -> None:
    bed.needs_nodes()
    labelled(bed, {"team": "search"})
    before = labels_of(bed)
    done = bed.deploy([restricted(bed), deployment()])
    assert {str(item.name): item.change for item in done.applied}[f"Namespace {bed.place}"] == "kept"
    assert labels_of(bed) == before


def test_warnings_of_the_server_are_shown(bed: Bed) -> None:
    labelled(bed, {"pod-security.kubernetes.io/warn": "restricted"})
    if isinstance(bed, SmallBed):
        bed.fake.warnings["Deployment"] = 'would violate PodSecurity "restricted:latest"'
    list(apply(bed.cluster, [deployment(securityContext={})]))
    assert [text for text in bed.warned if 'would violate PodSecurity "restricted:' in text]


@pytest.fixture
def specs(bed: Bed, tmp_path: Path) -> list[list[Object]]:
    """What two specs give, for the bed's namespace."""
    found = []
    for name in ("first", "second"):
        spec = spec_with(kubernetes={**NO_OPERATOR, "namespace": bed.place}).model_copy(update={"name": name})
        write_manifests(spec, "cpu", tmp_path / name)
        assert (tmp_path / name / RENDERED).is_file()
        found.append(bed.knows([item.data for item in objects_of(tmp_path / name).objects]))
    return found


@needs_kubectl
def test_two_specs_and_a_team_in_one_namespace(bed: Bed, specs: list[list[Object]]) -> None:
    """Neither changes an object of the other, and no policy selects pods of a third."""
    first, second = specs
    theirs = deployment(name="theirs")
    policy = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "theirs"},
        "spec": {"podSelector": {"matchLabels": {"app": "theirs"}}, "policyTypes": ["Ingress"]},
    }  # fmt: skip
    list(apply(bed.cluster, [theirs, policy]))
    before = bed.get(POLICIES, "theirs")["spec"]
    for documents in (first, second):
        assert {item.change for item in apply(bed.cluster, documents)} == {"created"}
    assert_unchanged(bed, first)
    secrets = {f"{bed.place}/{name}-{what}" for name in ("first", "second") for what in ("api-keys", "triton-control")}
    assert set(ensure_secrets(bed.cluster, [*first, *second])) == secrets
    assert bed.get(POLICIES, "theirs")["spec"] == before
    ours = [item for item in bed.cluster.list_objects(POLICIES, bed.place).items if metadata(item)["name"] != "theirs"]
    assert ours
    about = {"name": "theirs", "labels": {"app": "theirs"}}
    spec = theirs["spec"]["template"]["spec"]
    list(apply(bed.cluster, [{"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}]))
    for item in ours:
        chosen = label_selector({"spec": {"selector": item["spec"]["podSelector"]}})
        assert chosen
        found = bed.cluster.list_objects(PODS, bed.place, {"labelSelector": chosen}).items
        assert "theirs" not in {metadata(each)["name"] for each in found}, metadata(item)["name"]


@pytest.fixture
def run() -> Callable[..., Result]:
    app = typer.Typer()
    app.command("status")(commands.cluster_status)
    app.command("undo")(commands.undo)

    def invoke(command: str, file: Path, kubeconfig: Path) -> Result:
        arguments = [command, str(file), "--name", "demo", "--kubeconfig", str(kubeconfig)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return invoke


def test_a_namespace_admin_deploys_looks_and_goes_back(bed: Bed, tmp_path: Path, run: Callable[..., Result]) -> None:
    """With the rights that k8s/README.md lists, and to look and to go back none on Secrets."""
    bed.needs_nodes()
    volume = {"name": "control", "secret": {"secretName": "demo-triton-control"}}
    good, better = (
        [restricted(bed), deployment(volumes=[volume]), config_map(text=text), job(script=text)]
        for text in ("true", "true; true")
    )
    with bed.admin(secrets=True) as kubeconfig, Cluster.connect(kubeconfig) as admin:
        told: list[str] = []
        admin.warn = told.append
        for documents in (good, better):
            deploy(admin, "demo", documents, bed.patience, silent)
        assert any("no right to create pods" in text for text in told), "what could not be tried is said"
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}}
        with pytest.raises(ClusterError, match=r"no right to .*services"):
            deploy(admin, "demo", [*good, service], bed.patience, silent)
    assert bed.cluster.get(SECRETS, bed.place, "demo-triton-control") is not None
    file = tmp_path / "set.yaml"
    file.write_text(yaml.safe_dump_all(better))
    with bed.admin(secrets=False) as kubeconfig:
        looked = run("status", file, kubeconfig)
        assert looked.exit_code == 0, looked.output
        assert f"Deployment {bed.place}/server: done" in looked.output
        back = run("undo", file, kubeconfig)
        assert back.exit_code == 0, back.output
    assert bed.get(CONFIG_MAPS, "settings")["data"] == {"text": "true"}


def test_a_build_whose_pods_are_refused_says_so(bed: Bed) -> None:
    """Only events tell. Who may not create pods has not tried them before."""
    bed.leave_no_room(IMAGE)
    with bed.admin(secrets=True) as kubeconfig, Cluster.connect(kubeconfig) as admin:
        admin.warn = [].append
        with pytest.raises(RolloutError, match=rf"pods of Job {bed.place}/engines: .*exceeded quota.*describe quota"):
            deploy(admin, "demo", [job()], bed.patience, silent)
