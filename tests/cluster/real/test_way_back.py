"""The way back: a wrong tag, the same set again, and what failed sets leave behind."""

from __future__ import annotations

import pytest

from cluster.errors import RolloutError
from cluster.kinds import CONFIG_MAPS, Resource
from cluster.revision import read_history
from tests.cluster.deploy_objects import DEPLOYMENTS, config_map
from tests.cluster.real.bed import IMAGE, WRONG, Bed, deployment, job

JOBS = Resource("batch/v1", "Job", "jobs", True)


def image(bed: Bed) -> str:
    spec = bed.get(DEPLOYMENTS, "server")["spec"]
    return str(spec["template"]["spec"]["containers"][0]["image"])


@pytest.fixture(autouse=True)
def _nodes(bed: Bed) -> None:
    bed.needs_nodes()


def test_what_served_is_back_and_a_corrected_set_deploys(bed: Bed) -> None:
    """The Job hangs at its image, and will not end by itself."""
    bed.deploy([deployment(), job()])
    with pytest.raises(RolloutError, match="ImagePull") as caught:
        bed.deploy([deployment(WRONG), job(WRONG)], undo_on_failure=True)
    assert str(caught.value).splitlines()[-1].startswith("State: undone: revision 1 is back as revision 3, ready")
    assert image(bed) == IMAGE
    assert bed.cluster.get(JOBS, bed.place, "engines") is None, "its work was done when revision 1 became ready"
    assert bed.deploy([deployment(), job(script="true; true")]).revision.outcome == "ready"


def test_undo_after_a_failure(bed: Bed) -> None:
    bed.deploy([deployment(), job()])
    with pytest.raises(RolloutError, match="ImagePull") as caught:
        bed.deploy([deployment(WRONG), job(WRONG)])
    assert str(caught.value).splitlines()[-1] == (
        "State: revision 2 (not ready) is in the cluster, whole or in part; `trireme undo` brings revision 1 back"
    )
    assert bed.undo().revision.restores == 1
    assert image(bed) == IMAGE


def test_the_same_set_again_is_no_new_revision(bed: Bed) -> None:
    bed.deploy([deployment(), config_map("first")])
    for _ in range(5):
        done = bed.deploy([deployment(), config_map("second")])
        assert done.revision.number == 2
    assert {item.change for item in done.applied} == {"unchanged"}
    assert bed.undo().revision.restores == 1


def test_failed_sets_leave_nothing(bed: Bed) -> None:
    bed.deploy([deployment()])
    for number in range(4):
        with pytest.raises(RolloutError):
            bed.deploy([deployment(WRONG), config_map(f"try-{number}")])
    bed.deploy([deployment(), config_map("last")])
    assert {name for name in bed.names(CONFIG_MAPS) if name.startswith("try-")} == set()
    assert not read_history(bed.cluster, "demo").strays
