"""What applies the rendered set from Git, again and again: it finds what it wrote, and nothing goes by itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from cluster.api import Cluster
from cluster.apply import dry_run
from cluster.diff import changes_text
from tests.cluster.deploy_objects import apply_as, prepare
from tests.cluster.fake_cluster import FakeCluster
from tests.conftest import needs_kubectl
from tests.manifests.test_overlay import SPECS, made

ARGO, FLUX = "argocd.argoproj.io/sync-options", "kustomize.toolkit.fluxcd.io"
pytestmark = [needs_kubectl, pytest.mark.parametrize("name", SPECS)]


def documents_of(name: str) -> list[dict[str, Any]]:
    return [dict(item.data) for item in made(name).objects]


def stands(wanted: Any, held: Any) -> bool:
    """Whether all that is wanted stands in what is held, in its order: what Argo CD calls synced. The server may add
    keys, and no items."""
    if isinstance(wanted, dict):
        return isinstance(held, dict) and all(key in held and stands(item, held[key]) for key, item in wanted.items())
    if isinstance(wanted, list):
        return isinstance(held, list) and len(wanted) == len(held) and all(map(stands, wanted, held))
    return bool(wanted == held)


def test_applied_read_back_and_applied_again_nothing_differs(name: str, cluster: Cluster, fake: FakeCluster) -> None:
    documents = documents_of(name)
    prepare(fake, documents)
    held = [apply_as("kustomize-controller", cluster, item, force=True) for item in documents]
    differs = [item["kind"] for item, found in zip(documents, held, strict=True) if not stands(item, found)]
    assert not differs, "the server holds other values than were written: each sync would write them again"
    version = fake._version
    for item in documents:
        apply_as("kustomize-controller", cluster, item, force=True)
    assert fake._version == version, "the second apply wrote something"
    assert changes_text(dry_run(cluster, documents)) == ""


def test_nothing_goes_by_itself_and_what_cannot_change_is_replaced(name: str) -> None:
    for item in documents_of(name):
        marks = item["metadata"].get("annotations") or {}
        assert not re.search("ttlSecondsAfterFinished|generateName", yaml.safe_dump(item)), item["kind"]
        if item["kind"] == "Job":
            assert marks[ARGO] == "Force=true,Replace=true"
            assert marks[f"{FLUX}/force"] == "enabled"
        if item["kind"] == "PersistentVolumeClaim":
            assert marks[ARGO] == "Delete=false,Prune=false"
            assert marks[f"{FLUX}/prune"] == "disabled"


def test_no_variable_that_flux_would_fill_in(name: str) -> None:
    for item in documents_of(name):
        marks = item["metadata"].get("annotations") or {}
        assert "${" not in yaml.safe_dump(item) or marks[f"{FLUX}/substitute"] == "disabled", item["kind"]
