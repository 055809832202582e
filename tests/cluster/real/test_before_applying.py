"""What a cluster lacks for the pods of a set is found before anything is applied."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.kinds import CLAIMS, CONFIG_MAPS
from tests.cluster.deploy_objects import DEPLOYMENTS, claim, config_map
from tests.cluster.real.bed import ABSENT, IMAGE, Bed, deployment, job, labelled


def refused(bed: Bed, documents: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ClusterError, match=reason) as caught:
        bed.deploy([config_map(), *documents])
    assert "State: nothing was changed" in str(caught.value)
    assert bed.cluster.get(CONFIG_MAPS, bed.place, "settings") is None


def test_a_storage_class_that_is_not_there(bed: Bed) -> None:
    wanted = claim()
    wanted["spec"] |= {"storageClassName": ABSENT, "resources": {"requests": {"storage": "1Gi"}}}
    refused(bed, [wanted], rf"storage class {ABSENT}, which the cluster does not have.*kubectl get storageclass")
    assert bed.cluster.get(CLAIMS, bed.place, "store") is None


def test_a_priority_class_that_is_not_there(bed: Bed) -> None:
    bed.judge_pods(f"no PriorityClass with name {ABSENT} was found")
    refused(bed, [deployment(priorityClassName=ABSENT)], r"no PriorityClass with name.*kubernetes\.priority_class")
    assert bed.cluster.get(DEPLOYMENTS, bed.place, "server") is None


@pytest.mark.parametrize("documents", [[deployment()], [job()]], ids=["Deployment", "Job"])
def test_a_quota_that_is_used_up(bed: Bed, documents: list[dict[str, Any]]) -> None:
    bed.leave_no_room(IMAGE)
    bed.judge_pods("exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0")
    refused(bed, documents, r"a pod of \w+ [\s\S]*exceeded quota: none.*kubectl describe quota")


def test_a_pod_that_the_level_of_the_namespace_forbids(bed: Bed) -> None:
    bed.judge_pods('violates PodSecurity "restricted:latest": runAsNonRoot != true')
    labelled(bed, {"pod-security.kubernetes.io/enforce": "restricted"})
    refused(bed, [deployment(securityContext={})], r'violates PodSecurity "restricted:latest"')
