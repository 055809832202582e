"""What is written is what the server holds, for two managers, diff and Git; and the lint judges as the server does."""

from __future__ import annotations

import pytest
import yaml

from builders.manifests.lint.check import check_texts
from builders.manifests.lint.definitions import definitions
from builders.manifests.lint.objects import KubeObject
from cluster.apply import dry_run
from cluster.errors import ClusterError
from cluster.kinds import DEFINITIONS, Object
from tests.cluster.deploy_objects import apply_as, config_map
from tests.cluster.real.bed import Bed, assert_unchanged, deployment, job
from tests.cluster.test_gitops import stands
from tests.conftest import needs_kubectl
from tests.manifests.test_lint_fields import MISTAKES, objects, spoiled
from tests.manifests.test_overlay import made

_OF_THE_CLUSTER = ("Namespace", "PersistentVolume")
_REFUSED = (400, 404, 422, 500)  # no kind or namespace of this name; 500: lists that are keyed hold a key twice


@pytest.fixture(params=["no operator in the cluster", "a MIG slice"])
def rendered(bed: Bed, request: pytest.FixtureRequest) -> list[Object]:
    found = [item.data for item in made(request.param).objects if item.kind not in _OF_THE_CLUSTER]
    return bed.knows([{**item, "metadata": {**item["metadata"], "namespace": bed.place}} for item in found])


@needs_kubectl
def test_kubectl_and_then_trireme_agree(bed: Bed, rendered: list[Object]) -> None:
    """First as the program of old applies, on its own side, and then as README.md does."""
    for options in ((), ("--server-side",)):
        bed.apply_by_kubectl(rendered, *options)
        assert_unchanged(bed, rendered)


@needs_kubectl
def test_from_git_again_and_again_nothing_differs(bed: Bed, rendered: list[Object]) -> None:
    """As Argo CD and Flux apply: what is written stands in what is held, and a second time changes nothing."""
    first = [apply_as("kustomize-controller", bed.cluster, dict(item), force=True) for item in rendered]
    differs = [item["kind"] for item, found in zip(rendered, first, strict=True) if not stands(item, found)]
    assert not differs
    for item in rendered:
        apply_as("kustomize-controller", bed.cluster, dict(item), force=True)
    assert_unchanged(bed, rendered)


def test_a_diff_is_empty_after_a_deployment(bed: Bed) -> None:
    bed.needs_nodes()
    documents = [deployment(), job(), config_map()]
    bed.deploy(documents)
    assert_unchanged(bed, documents)


def errors(bed: Bed, item: Object) -> list[str]:
    """As `lint-manifests --cluster` checks: with the definitions that the cluster has."""
    bed.needs("list", DEFINITIONS)
    given = [KubeObject(found) for found in bed.cluster.list_objects(DEFINITIONS, "").items]
    checked = check_texts([("x.yaml", yaml.safe_dump(dict(item)))], given=definitions(given))
    return [str(finding) for finding in checked.findings if finding.severity == "error"]


def server_takes(bed: Bed, item: Object) -> bool:
    try:
        dry_run(bed.cluster, [item])
    except ClusterError as error:
        if error.code not in _REFUSED:
            raise
        return False
    return True


def test_lint_and_server_take_the_right_objects(bed: Bed) -> None:
    known = bed.knows(list(objects().values()))
    assert len(known) >= 18  # all but those of operators
    refused = {item["kind"]: errors(bed, item) for item in known if not server_takes(bed, item) or errors(bed, item)}
    assert not refused


def test_lint_and_server_refuse_the_same_mistakes(bed: Bed) -> None:
    """Each edit of tests/manifests/field_mistakes.yaml of a kind that the cluster has, in a dry run."""
    known = bed.knows(list(objects().values()))
    items = [
        (f"{title} {puts}", spoiled(title, puts))
        for title, puts in MISTAKES
        if objects()[title] in known and bed.judges(title, puts)
    ]
    assert len(items) >= 2
    taken = [text for text, item in items if server_takes(bed, item)]
    missed = [text for text, item in items if not errors(bed, item)]
    assert (taken, missed) == ([], []), "the server takes these, or the lint does"
