"""Each test runs on the small server, and with `-m cluster` in the cluster that KUBECONFIG names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.real.bed import Bed, named_bed, small_bed


@pytest.fixture(
    params=[
        pytest.param(small_bed, id="small-server"),
        pytest.param(named_bed, id="named-cluster", marks=pytest.mark.cluster),
    ]
)
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bed]:
    if request.param is named_bed and "cluster" not in request.config.option.markexpr:
        pytest.skip("a cluster is touched by `make test-cluster` only")  # a KUBECONFIG is often just there
    with request.param(tmp_path) as found:
        yield found
