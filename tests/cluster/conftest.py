"""The fake API server, and a client of it; a file whose tests need controllers, or other images, makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api import Cluster
from tests.cluster.fake_api import serving, write_kubeconfig
from tests.cluster.fake_cluster import FakeCluster


@pytest.fixture
def fake() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def cluster(fake: FakeCluster, tmp_path: Path) -> Iterator[Cluster]:
    with serving(fake) as url, Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", url)) as found:
        yield found
